"""What is in a wheel and an sdist: python3 .ci/dist_contents.py WHEEL SDIST."""

import sys
import tarfile
import zipfile

wheel, sdist = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    in_wheel = archive.namelist()
with tarfile.open(sdist) as source:
    in_sdist = [name.partition("/")[2] for name in source.getnames()]
for names in (in_wheel, in_sdist):
    assert any(name.endswith("LICENSE") for name in names), "no licence"
for needed in ("protoclip/csrc/bindings.cpp", "protoclip/kernels/launch.py", "protoclip/py.typed"):
    assert needed in in_wheel, f"the wheel lacks {needed}"
strangers = [name for name in in_wheel if not name.startswith(("protoclip/", "protoclip-"))]
assert not strangers, f"the wheel would install {strangers}"
for needed in ("csrc/bindings.cpp", "kernels/launch.py", "README.md", "setup.py"):
    assert needed in in_sdist, f"the sdist lacks {needed}"
print(f"{len(in_wheel)} files in the wheel, {len(in_sdist)} in the sdist, licence in both")
