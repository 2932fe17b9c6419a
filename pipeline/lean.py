"""A quicker start for processes that are ours alone: commands and workers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _NoPandas:
    """A finder by which there is no pandas."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not wanted here", name=name)
        return None


def import_arrow_without_pandas() -> None:
    """Import pyarrow, and let it find no pandas.

    It imports pandas, where that is installed, at its first scalar, only to know whether it is handed any: more than a
    second of CPU a process, for nothing. Not for a process that others share, where pyarrow must convert to pandas.
    Does nothing where either is imported already.
    """
    if "pandas" in sys.modules or "pyarrow.dataset" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        import pyarrow.dataset  # noqa: F401
    finally:
        sys.meta_path.remove(finder)


def import_open_clip_without_timm() -> None:
    """Let open_clip be imported without timm and torch's compiler, which most models have no use for.

    It imports both: timm for the towers that come from there, the compiler by way of one of torchvision's operators.
    They are 5 of the 9 seconds of CPU of ``import open_clip``. The first tower of timm imports timm; whoever compiles
    imports the compiler. Does nothing where they are imported already.
    """
    _Within.install("torchvision.ops.roi_align", _no_compiler)
    _Within.install("open_clip.timm_model", _no_timm)


Context = Callable[[ModuleType], AbstractContextManager[None]]


class _Within:
    """A finder of one module, which runs it in a context; then it is gone."""

    def __init__(self, name: str, context: Context) -> None:
        self._name, self._context = name, context

    @classmethod
    def install(cls, name: str, context: Context) -> None:
        known = any(isinstance(finder, cls) and finder._name == name for finder in sys.meta_path)
        if name not in sys.modules and not known:
            sys.meta_path.insert(0, cls(name, context))

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        loader: Any = spec and spec.loader
        if loader is not None:
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # the loader's own again, for who reloads it
                with self._context(module):
                    run(module)

            loader.exec_module = exec_module
        return spec


@contextmanager
def _no_compiler(_: ModuleType) -> Iterator[None]:
    """The operator asks the compiler one thing, and that when it is called."""

    def is_compile_supported(device: str) -> Any:
        return importlib.import_module("torch._dynamo.utils").is_compile_supported(device)

    utils = ModuleType("torch._dynamo.utils")
    vars(utils)["is_compile_supported"] = is_compile_supported
    with _in_place_of({"torch._dynamo": ModuleType("torch._dynamo"), utils.__name__: utils}):
        yield


@contextmanager
def _no_timm(adapter: ModuleType) -> Iterator[None]:
    with _in_place_of({"timm": None}):
        yield
    if adapter.timm is not None:  # it was there already
        return
    tower = adapter.TimmModel
    init = tower.__init__

    @wraps(init)
    def import_first(self: Any, *args: Any, **kwargs: Any) -> None:
        tower.__init__ = init
        importlib.reload(adapter)  # its globals, which ``init`` reads
        adapter.TimmModel = tower  # type: ignore[attr-defined]
        init(self, *args, **kwargs)

    tower.__init__ = import_first


@contextmanager
def _in_place_of(modules: dict[str, ModuleType | None]) -> Iterator[None]:
    """These modules as the ones that an import finds, None: it finds none; unless they are imported by now."""
    put = {} if modules.keys() & sys.modules.keys() else modules
    sys.modules.update(put)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in put:
            sys.modules.pop(name, None)
