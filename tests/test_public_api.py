"""The public names, from a fresh interpreter: what they are does not depend on what was imported before."""
import subprocess
import sys

import pytest

CHECK = """
import fine_tune_llm as ft, inspect
assert callable(ft.audit) and list(inspect.signature(ft.audit).parameters)[:3] == ["preds", "sets", "policy"]
try: ft.audit(None)
except Exception as e: assert "NoneType" in str(e), e
import fine_tune_llm.audit.report as report
assert report.AuditReport is ft.AuditReport
"""


@pytest.mark.parametrize("before", ["", "from fine_tune_llm.audit.groups import verdict", "import fine_tune_llm; fine_tune_llm.audit"])
def test_audit_is_callable_in_any_order(before: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"{before}\n{CHECK}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_unknown_name_is_an_attribute_error() -> None:
    import fine_tune_llm
    with pytest.raises(AttributeError, match="no attribute 'finetoon'"):
        _ = fine_tune_llm.finetoon
    assert set(fine_tune_llm.__all__) <= set(dir(fine_tune_llm))
