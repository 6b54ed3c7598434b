"""Typed configuration: `schema` says what exists, `plan` checks it as a whole, `overrides` reads it, `recipes` are runs."""
