__version__ = "0.1.0"

import logging

# on some processors it advises a download whenever it is imported, whether or not anything is quantized
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOME = {  # public name -> the module that defines it; loaded at first use, so `import fine_tune_llm` stays cheap
    **dict.fromkeys(("FineTuneLLMError", "ConfigurationError", "DataError", "ModelError", "TrainingError", "InferenceError",
                     "AuditError", "RunError", "OverlapError", "TooFewRowsError"), "core.errors"),
    "Labels": "core.labels", "Run": "core.runs",
    "Predictions": "uncertainty.predictions", "join_truth": "uncertainty.joining",
    **dict.fromkeys(("Estimate", "accuracy", "nll", "brier", "ece"), "uncertainty.metrics"),
    **dict.fromkeys(("Interval", "CalibrationState", "mce", "classwise_ece", "smooth_ece", "aurc", "augrc", "prr"), "uncertainty.metrics"),
    "TemperatureScaling": "uncertainty.calibration",
    "AdaptiveConformal": "uncertainty.online", "ExchangeabilityMonitor": "uncertainty.monitor",
    **dict.fromkeys(("choose_calibrator", "load_calibrator"), "uncertainty.calibration_choice"),
    **dict.fromkeys(("IsotonicCalibration", "HistogramBinning"), "uncertainty.calibration_steps"),
    **dict.fromkeys(("PlattScaling", "BetaCalibration"), "uncertainty.calibration_curves"),
    **dict.fromkeys(("VectorScaling", "DirichletCalibration"), "uncertainty.calibration_maps"),
    **dict.fromkeys(("ConformalClassifier", "PredictionSets"), "uncertainty.conformal"),
    **dict.fromkeys(("coverage_by", "coverage_by_class", "size_strata", "worst_slab"), "uncertainty.conditional"),
    "join_sets": "uncertainty.sets", "conformal_p_values": "uncertainty.p_values", "cross_conformal": "uncertainty.cross",
    **dict.fromkeys(("DecisionPolicy", "Decisions"), "uncertainty.risk"),
    "AuditReport": "audit.report", "audit": "audit",
    "group_metrics": "audit.groups", "parity": "audit.parity", "find_slices": "audit.slices",
    "Dossier": "audit.dossier", "model_card": "audit.card", "compare": "audit.comparison",
    "shift": "audit.shift", "robustness": "audit.robustness", "compare_generated": "audit.generated",
    "load_data": "data.loading", "docstrings": "data.docstrings",
    **dict.fromkeys(("data_truth", "DataTruth"), "data.truth"), "Template": "data.templates",
    **dict.fromkeys(("check_data", "DataReport"), "data.report"), "split_data": "data.dealing",
    "read_rows": "data.files", "load_rows": "data.forms",
    "load_model": "models.loading", "preset": "models.presets", "score_label_words": "models.label_scoring", "generate_answers": "models.generation",
    "merge": "models.merging", "prepare_serving": "models.serving", "push_to_hub": "models.hub",
    "summarize_runs": "core.events", "export_events": "core.trackers", "configure_logging": "core.logs",
    "finetune": "training.trainer", "launch": "training.launch", "sft_data": "training.corpus",
    **dict.fromkeys(("preflight", "preflight_report"), "training.preflight"),
    **dict.fromkeys(("load_pairs", "load_judgements", "split_pairs"), "training.choices"), "prefer": "training.preference", "sweep": "training.sweeps",
    "TrainingPanel": "panels.training", "StartPanel": "panels.start_panel", "compare_runs": "panels.compare_runs", "DataPanel": "panels.data_panel", "AuditPanel": "panels.audit_panel",
    "CalibrationPanel": "panels.calibration_panel", "ConformalPanel": "panels.conformal_panel", "RiskPanel": "panels.risk_panel",
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
