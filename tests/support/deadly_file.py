"""A file of which some records end the process that reads them, as a broken library might. Imports little: processes wait."""

import os
import signal

from internvl_megatron.data.jsonl_file import JsonlFile

DEADLY_RECORDS = (70, 71, 130)


class DeadlyFile(JsonlFile):
    """Reads what `JsonlFile` reads."""

    def read(self, index):
        if index in DEADLY_RECORDS:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)
