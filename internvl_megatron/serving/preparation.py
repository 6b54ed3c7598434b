"""From what a request asks to a job: images on disk and seen to be images, the prompt as tokens. Takes time: not for the event loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl_megatron.data.files import FileError, FileFault
from internvl_megatron.data.images import MAX_IMAGE_PIXELS, decode_tiles, image_size
from internvl_megatron.errors import ConfigError
from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation
from internvl_megatron.serving.chat_request import ChatRequest, SentImage
from internvl_megatron.serving.engine import remove_files
from internvl_megatron.serving.errors import ApiError
from internvl_megatron.serving.jobs import Job, Tell

_FAULTS: dict[FileFault, str] = {
    "pixels": f"has no pixels, or more than {MAX_IMAGE_PIXELS}; scale it",
    "image": "is no image that can be read, or a damaged one; send JPEG, PNG, WEBP, BMP, GIF, TIFF or PPM",
}


def prepare(
    generator: Generator, asked: ChatRequest, settings: Generation, number: int, folder: Path, tell: Tell
) -> Job:
    """Make a job of what is asked.

    Args:
        generator: that will answer.
        asked: the request.
        settings: how, the seed included.
        number: of the job.
        folder: for images; they are removed when the job leaves the engine, or if this raises.
        tell: is told of the answers.

    Raises:
        ApiError: an image is none, or prompt and answer do not fit the context.
    """
    paths = tuple(str(folder / f"{number}-{index}") for index in range(len(asked.images)))
    prompt = Prompt(asked.question, paths, asked.system, asked.history)
    try:
        for path, image in zip(paths, asked.images, strict=True):
            Path(path).write_bytes(image.content)
            with _naming(image):
                image_size(path)
        (rendered,) = generator.renderer.render_all([prompt], settings.v2pe_numerator, settings.max_new_tokens)
        for planned, image in zip(rendered.images, asked.images, strict=True):
            with _naming(image):  # a damaged one must not come to light in the batch, which others share
                decode_tiles(planned, generator.config.model.vision.tile_pixels, generator.config.data.use_thumbnail)
    except BaseException as error:
        remove_files(paths)
        if isinstance(error, ConfigError):
            raise ApiError(400, str(error), "messages", "context_length_exceeded") from error
        raise
    return Job(number, prompt, settings, asked.num_answers, rendered, tell)


@contextmanager
def _naming(image: SentImage) -> Iterator[None]:
    """Errors of an image's file, without the file's name, which the client knows nothing of."""
    try:
        yield
    except FileError as error:
        if error.fault not in _FAULTS:
            raise
        raise ApiError(400, f"{image.where}: {_FAULTS[error.fault]}", image.where, "invalid_image") from error
