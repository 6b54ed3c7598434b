"""The JSON object of a record, parsed and checked to be one."""

import json
from typing import Any

from internvl_megatron.errors import DataError


def parse_object(content: bytes, where: str, demand: str) -> dict[str, Any]:
    """The JSON object that some bytes are.

    Args:
        content: UTF-8.
        where: place it was read from, for messages.
        demand: who must be an object: "each line", for messages.

    Raises:
        DataError: they are something else.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not valid JSON ({error}); {demand} must be one object") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: is a JSON {type(value).__name__}; {demand} must be one object")
    return value
