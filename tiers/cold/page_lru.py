"""Cold pages that a layer read last, kept in memory for the next step that wants them."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from pagedkv.tiers.cold.record import ColdRecord

Bytes = npt.NDArray[np.uint8]


class KeptPages:
    """As many pages as decode steps read at most; the one wanted least recently goes first.

    A record knows its copy (`ColdRecord.kept`), so whoever reads it finds it.
    """

    def __init__(self, most: int) -> None:
        """Keep nothing yet.

        Args:
            most: pages.
        """
        self.most = most
        self._records: OrderedDict[ColdRecord, None] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(record.nbytes for record in self._records)

    def keep(self, record: ColdRecord, page: Bytes) -> None:
        """Keep a copy of a page that was wanted just now.

        Args:
            record: of the page.
            page: its bytes, verified.
        """
        if record.kept is None:
            record.kept = page.copy()
        self._records[record] = None
        self._records.move_to_end(record)
        while len(self._records) > self.most:
            oldest, _ = self._records.popitem(last=False)
            oldest.kept = None

    def forget(self, record: ColdRecord) -> None:
        """A page is gone, or in memory for good."""
        record.kept = None
        self._records.pop(record, None)
