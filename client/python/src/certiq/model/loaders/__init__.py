"""Whether a checkpoint is whole, and which programs load it: certiq-check-model.

from certiq.model.loaders.check import check_model

result = check_model(Path("OUT"), ["vllm"])
result.ok, result.findings, result.loads_in
"""
