"""Scores of which every target is kept: `score(protocol, model, text, accumulate=PerTarget)`."""

import torch

from recurgolf.audit.scorer import Recorder


class PerTarget(Recorder):
    """The audit's record of every target, added up over ranks as well."""

    @property
    def target_nats(self):
        return self._nats

    @property
    def scored(self):
        """How often every target was scored."""
        return self._times

    def reduce(self, all_reduce):
        super().reduce(all_reduce)
        for part in (self._nats, self._times):
            part[:] = all_reduce(torch.from_numpy(part)).numpy()
