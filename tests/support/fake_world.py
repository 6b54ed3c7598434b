"""A device of ranks that are alone in a world of any size."""

from internvl_megatron.device import Device


class FakeWorldDevice(Device):
    """A CPU whose messages go nowhere: one process is any rank of a world of any size."""

    @property
    def backend(self) -> str:
        return "fake"

    @property
    def host_backend(self) -> str:
        return "fake"
