"""Unpickling in as little memory as the pickle needs."""

import pickle
import struct
from typing import Any


class SparingUnpickler(pickle._Unpickler):
    """Unpickler that takes no more memory than the file has; the one in C takes what the file declares."""

    def load_bytearray8(self) -> None:
        (count,) = struct.unpack("<Q", self.read(8))  # type: ignore[attr-defined]
        self.append(bytearray(self.read(count)))  # type: ignore[attr-defined]

    dispatch: dict[int, Any] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}
