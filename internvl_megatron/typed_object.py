"""A JSON object as a flat dataclass, every field of the type that it declares: what a file says is not trusted to be what it should."""

from typing import Any, get_args, get_origin, get_type_hints

LARGEST_EXACT = 2**53
"""JSON may write a fraction without its point; larger whole numbers are no fractions."""


def typed_object[T](kind: type[T], fields: object) -> T:
    """An instance of a dataclass whose fields are texts, numbers, flags, or lists or objects of these.

    Raises:
        ValueError: it is no object, has fields that the class does not, or lacks some, or one has another type; says which.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"a {type(fields).__name__} in place of an object")
    hints = get_type_hints(kind)
    for name, value in fields.items():
        if name not in hints:
            raise ValueError(f"there is no field {name!r}")
        if not _fits(value, hints[name]):
            raise ValueError(
                f"field {name!r} is {value!r:.80}, which is no {getattr(hints[name], '__name__', hints[name])}"
            )
    try:
        return kind(**fields)
    except TypeError as error:
        raise ValueError(str(error)) from error


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_fits(one, get_args(hint)[0]) for one in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(one, get_args(hint)[1]) for one in value.values())
    options = get_args(hint) or (hint,)
    return type(value) in options or (float in options and type(value) is int and abs(value) < LARGEST_EXACT)
