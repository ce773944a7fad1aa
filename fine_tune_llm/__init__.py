__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it; loaded at first use, so `import fine_tune_llm` stays cheap
    **dict.fromkeys(("FineTuneLLMError", "ConfigurationError", "DataError", "ModelError", "TrainingError", "InferenceError",
                     "AuditError", "RunError", "OverlapError", "TooFewRowsError"), "core.errors"),
    "Labels": "core.labels", "Run": "core.runs",
    "Predictions": "uncertainty.predictions",
    **dict.fromkeys(("Estimate", "accuracy", "nll", "brier", "ece"), "uncertainty.metrics"),
    "TemperatureScaling": "uncertainty.calibration",
    **dict.fromkeys(("ConformalClassifier", "PredictionSets"), "uncertainty.conformal"),
    **dict.fromkeys(("DecisionPolicy", "Decisions"), "uncertainty.risk"),
    "AuditReport": "audit.report", "audit": "audit",
    "group_metrics": "audit.groups", "parity": "audit.parity", "find_slices": "audit.slices",
    "Dossier": "audit.dossier", "model_card": "audit.card", "compare": "audit.comparison",
    "shift": "audit.shift", "robustness": "audit.robustness",
    "load_data": "data.loading", "docstrings": "data.docstrings",
    "load_model": "models.loading", "finetune": "training.trainer",
    "TrainingPanel": "panels.training",
    **dict.fromkeys(("Bundle", "bundle", "load_bundle"), "apps.bundle"),
}
__all__ = ["__version__", *_HOME]


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module 'fine_tune_llm' has no attribute {name!r}")
    from importlib import import_module
    home = import_module(f"fine_tune_llm.{_HOME[name]}")
    value = home if name == "audit" else getattr(home, name)  # the audit floor is itself the function
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
