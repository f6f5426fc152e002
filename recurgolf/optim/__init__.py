"""How weights move: optimizers by parameter role, their schedules, and averages of the weights."""

from recurgolf.config import import_modules
from recurgolf.optim.averaging import EMA, LAWA, SWA, Averager, Averaging, NoAveraging
from recurgolf.optim.groups import ParameterGroup
from recurgolf.optim.muon import Muon, zeropower
from recurgolf.optim.numuon import NuMuon
from recurgolf.optim.optimizers import Optimizers, build, gather_state
from recurgolf.optim.options import AllAdamW, MuonAdam, OptimizerConfig
from recurgolf.optim.roles import ROLES, parameter_roles
from recurgolf.optim.schedule import (
    FractionSchedule,
    Schedule,
    StepsSchedule,
    WallclockSchedule,
    training_fraction,
)

MODULES = import_modules(__name__)

__all__ = [
    "EMA",
    "LAWA",
    "ROLES",
    "SWA",
    "AllAdamW",
    "Averager",
    "Averaging",
    "FractionSchedule",
    "Muon",
    "MuonAdam",
    "NoAveraging",
    "NuMuon",
    "OptimizerConfig",
    "Optimizers",
    "ParameterGroup",
    "Schedule",
    "StepsSchedule",
    "WallclockSchedule",
    "build",
    "gather_state",
    "parameter_roles",
    "training_fraction",
    "zeropower",
]
