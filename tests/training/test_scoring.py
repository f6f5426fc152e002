"""Validations within training: what they may touch."""

import dataclasses
import signal

import pytest
import torch
from smoke_runs import composed, small

from recurgolf.eval.windows import PlainEval
from recurgolf.training.job import Job
from recurgolf.training.scoring import validate
from recurgolf.training.signals import Interruption
from recurgolf.training.trainer import Trainer


class Learns(PlainEval):
    """Trains what it scores, and is stopped where it can put nothing back."""

    def run(self, scored_model, text, accumulator, **options):
        for parameter in scored_model.model.parameters():
            parameter.data += 1.0
        raise Interruption(signal.SIGTERM)


def test_a_stop_within_a_validation_that_learns_leaves_the_weights_as_they_train(tmp_path):
    job = Job.watched(dataclasses.replace(composed(*small()), eval=Learns()), tmp_path)
    trainer = Trainer(job)
    trainer.setup()
    before = {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}
    with pytest.raises(Interruption):
        validate(job, trainer.state)
    job.tracker.finish()
    job.log.close()
    saved = trainer.state.collect(job)[0]["model"]
    assert list(saved) == list(before)
    assert [name for name in before if not torch.equal(saved[name], before[name])] == []
