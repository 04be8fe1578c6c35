"""Building csrc/ where torch's own loader cannot: no ninja on the machine."""

import pytest
from torch.utils import cpp_extension

from protoclip.ops import _native

# A module without torch's headers compiles in a second.
SOURCE = """
#include <Python.h>
#define PASTE_(a, b) a##b
#define PASTE(a, b) PASTE_(a, b)
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "module", nullptr, -1, nullptr};
PyMODINIT_FUNC PASTE(PyInit_, TORCH_EXTENSION_NAME)() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", ANSWER);
  return module;
}
"""
needs_compiler = pytest.mark.skipif(
    "compiler" in (_native._obstacle("cpu") or ""), reason="no C++ compiler"
)


@needs_compiler
def test_without_ninja_setuptools_builds(tmp_path, monkeypatch):
    pytest.importorskip("setuptools")
    (tmp_path / "module.cpp").write_text(SOURCE)
    monkeypatch.setattr(cpp_extension, "is_ninja_available", lambda: False)
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    flags = ("-O1", "-DANSWER=42")
    build = _native.Build("cpu", (tmp_path / "module.cpp",), flags, (), {"test": str(tmp_path)})
    assert _native._locked_build(build).answer == 42
