"""Questions that ask for the reasoning before the answer, as VLMEvalKit's for InternVL do where USE_COT=1 (`internvl/utils.py`)."""

from internvl_megatron.evaluate.final_answer import final_answer

REASONING = {"reasoning": ("no", "yes")}
"""A benchmark's named option."""

_ENDING = (
    "The last line of your response should follow this format: 'Answer: \\boxed{{${place}}}' (without quotes), where {meaning}. "
    "If you are uncertain or the problem is too complex, make a reasoned guess based on the information provided. "
    "Avoid repeating steps indefinitely—provide your best guess even if unsure. "
    "Think step by step logically, considering all relevant information before answering."
)
_CHOICE = "Answer the preceding multiple choice question. " + _ENDING.format(
    place="LETTER", meaning="LETTER is one of the options"
)
_OPEN = "Answer the preceding question. " + _ENDING.format(
    place="FINAL_ANSWER", meaning="'FINAL_ANSWER' is your conclusion based on the reasoning provided"
)
_DIRECT = "Answer with the option's letter from the given choices directly."


def with_reasoning(prompt: str, is_choice: bool) -> str:
    """The prompt with the instruction in place of the one to answer directly."""
    if not is_choice:
        return f"{prompt}\n{_OPEN}"
    return f"{prompt.replace(_DIRECT, '').strip()}\n{_CHOICE}"


def conclusion(answer: str, reasoning: str) -> str:
    """What an answer comes to, where it was to be reasoned."""
    return final_answer(answer) if reasoning == "yes" else answer
