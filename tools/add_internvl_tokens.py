"""Write a bare language model's tokenizer (Qwen2.5's or InternLM3's) with InternVL's nine tokens.

python tools/add_internvl_tokens.py LANGUAGE_MODEL_FOLDER OUTPUT_FOLDER
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from internvl_megatron.data.tokenizer_extend import add_internvl_tokens
from internvl_megatron.errors import UserError


def main() -> int:
    """Read, write, say what was written. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language_model_folder", type=Path)
    parser.add_argument("output_folder", type=Path)
    arguments = parser.parse_args()
    try:
        num_tokens = add_internvl_tokens(arguments.language_model_folder, arguments.output_folder)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{arguments.output_folder}: {num_tokens} tokens\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
