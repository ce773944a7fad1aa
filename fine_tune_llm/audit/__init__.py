"""The audit floor. It can be called: `ft.audit(preds, ...)` is `fine_tune_llm.audit.report.audit(preds, ...)`."""
# Importing anything below `fine_tune_llm.audit` binds this package to the name `audit` of its parent, where the public
# function of that name would stand. So the package itself answers the call, and both spellings work in any order.
import sys
from inspect import Signature, signature
from types import ModuleType
from typing import Any


class AuditFloor(ModuleType):
    "A package that audits when it is called."
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from fine_tune_llm.audit.report import audit
        return audit(*args, **kwargs)

    @property
    def __signature__(self) -> Signature:
        from fine_tune_llm.audit.report import audit
        return signature(audit)


sys.modules[__name__].__class__ = AuditFloor
