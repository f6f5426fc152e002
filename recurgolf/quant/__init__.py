"""Quantization of plain tensors: grids, rounding, GPTQ, rules over parameter names."""

from recurgolf.config import import_modules
from recurgolf.quant.calibration import (
    Calibration,
    GramCollector,
    SelfGenerated,
    TrainCalibration,
)
from recurgolf.quant.clip import (
    Clip,
    HessianSigmaClip,
    MaxClip,
    MeanAbsClip,
    MeanSigmaClamp,
    PercentileClip,
    PercentileSearchClip,
    SigmaClip,
)
from recurgolf.quant.entropy import code_entropy, fit_tail, predicted_bits, predicted_bytes
from recurgolf.quant.gptq import GptqResult, gptq_quantize, gptq_quantize_many
from recurgolf.quant.learned_steps import LearnedSteps
from recurgolf.quant.lqer import LowRankCorrection
from recurgolf.quant.qat import FileSize, Noise, NoQat, Qat, QuantAware, Snap, StraightThrough
from recurgolf.quant.quantized_tensor import QuantizedTensor, Stored, dequantize, dequantize_state
from recurgolf.quant.quantizer_grid import QuantizerGrid
from recurgolf.quant.rate import Rate
from recurgolf.quant.rate_models import Gaussian, Histogram, Laplace, Logistic, RateModel
from recurgolf.quant.rtn import fake_quantize, rtn_quantize
from recurgolf.quant.rules import Int6, Int8, NoQuant, Quant, Rule, TensorRule
from recurgolf.quant.state import MethodReport, QuantizedState, quantize_state

MODULES = import_modules(__name__)

__all__ = [
    "Calibration",
    "Clip",
    "FileSize",
    "Gaussian",
    "GptqResult",
    "GramCollector",
    "HessianSigmaClip",
    "Histogram",
    "Int6",
    "Int8",
    "Laplace",
    "LearnedSteps",
    "Logistic",
    "LowRankCorrection",
    "MaxClip",
    "MeanAbsClip",
    "MeanSigmaClamp",
    "MethodReport",
    "NoQat",
    "NoQuant",
    "Noise",
    "PercentileClip",
    "PercentileSearchClip",
    "Qat",
    "Quant",
    "QuantAware",
    "QuantizedState",
    "QuantizedTensor",
    "QuantizerGrid",
    "Rate",
    "RateModel",
    "Rule",
    "SelfGenerated",
    "SigmaClip",
    "Snap",
    "Stored",
    "StraightThrough",
    "TensorRule",
    "TrainCalibration",
    "code_entropy",
    "dequantize",
    "dequantize_state",
    "fake_quantize",
    "fit_tail",
    "gptq_quantize",
    "gptq_quantize_many",
    "predicted_bits",
    "predicted_bytes",
    "quantize_state",
    "rtn_quantize",
]
