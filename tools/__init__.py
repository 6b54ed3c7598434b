"""One file per verb; run them from the checkout as `python -m tools.NAME`."""
