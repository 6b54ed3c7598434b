"""Write Qwen2.5's tokenizer with InternVL's nine tokens as a Hugging Face folder, without a download from the hub.

    python tools/build_qwen_tokenizer.py OUTPUT_FOLDER

The ranks come from the installed package `dashscope` (see `make setup`).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from internvl_megatron.data.tokenizer_build import find_dashscope_ranks, qwen2_5_tokenizer
from internvl_megatron.errors import UserError


def main() -> int:
    """Build, write, say what was written. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_folder", type=Path)
    output_folder: Path = parser.parse_args().output_folder
    try:
        tokenizer = qwen2_5_tokenizer(find_dashscope_ranks())
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    tokenizer.save_pretrained(str(output_folder))
    sys.stdout.write(f"{output_folder}: {len(tokenizer)} tokens\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
