"""Builds the package: the protobuf classes are generated from proto/orrery, nothing generated is kept in the repository."""

import importlib.metadata
import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY_PROTOS = HERE.parent.parent / "proto"
SDIST_PROTOS = HERE / "proto"


def proto_root() -> pathlib.Path:
    """The folder that holds orrery/common/v1/…: the repository's, or the copy in a source distribution."""
    for root in (SDIST_PROTOS, REPOSITORY_PROTOS):
        if (root / "orrery").is_dir():
            return root
    raise SystemExit(f"no .proto files in {REPOSITORY_PROTOS / 'orrery'} or {SDIST_PROTOS / 'orrery'}: "
                     "build from inside the repository or from a source distribution")


def generate(out: pathlib.Path) -> None:
    """Writes orrery/**/*_pb2.py and their type stubs under `out`."""
    from grpc_tools import protoc

    root = proto_root()
    files = sorted(root.glob("orrery/**/*.proto"))
    out.mkdir(parents=True, exist_ok=True)
    arguments = ["protoc", f"-I{root}", f"--python_out={out}", f"--pyi_out={out}", *map(str, files)]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed: " + " ".join(arguments))
    for folder in {parent for file in files for parent in (file.parent, file.parent.parent)}:
        made = out / folder.relative_to(root)
        if made != out / "orrery":
            (made / "__init__.py").touch()


class BuildWithProtos(build_py):
    def run(self) -> None:
        super().run()
        generate(HERE / "src" if self.editable_mode else pathlib.Path(self.build_lib))


class SdistWithProtos(sdist):
    def make_release_tree(self, base_dir, files) -> None:
        super().make_release_tree(base_dir, files)
        shutil.copytree(proto_root() / "orrery", pathlib.Path(base_dir) / "proto" / "orrery", dirs_exist_ok=True)


def protobuf_requirement() -> str:
    """What generated code needs at run time is what its generator needs."""
    for requirement in importlib.metadata.requires("grpcio-tools") or []:
        if requirement.lower().startswith("protobuf"):
            return requirement
    raise SystemExit("the installed grpcio-tools names no protobuf requirement")


setup(
    cmdclass={"build_py": BuildWithProtos, "sdist": SdistWithProtos},
    install_requires=[protobuf_requirement(), "grpcio>=1.62", "numpy>=1.26", "safetensors>=0.4.3"],
)
