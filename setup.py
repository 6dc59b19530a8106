"""Package metadata. Installing compiles nothing and needs no torch; name an extra that brings torch.

`pip install -e ".[cpu]"` and `".[gpu]"` pin different versions of torch and exclude each other. There is no open
`torch` requirement on purpose: beside an extra's pin it would be redundant, and alone it would fetch the newest CUDA
build.
"""

import re
import shutil
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+?)"', (root / "megatron_share4v/__init__.py").read_text(encoding="utf-8"))[1]
readme = root / "README.md"

requirements = [
    "megatron-core==0.16.1",  # the version that megatron_share4v/mcore was written against, on every Python
    "numpy>=2,<3",
    "pyyaml>=6",
    "pydantic>=2.10,<3",
    "typing-extensions>=4.8",
    "pillow>=10",
    "simplejpeg>=1.7",  # reports libjpeg's warnings about damaged data, which Pillow drops
    "sentencepiece>=0.2.3",
    "tokenizers>=0.22",  # tokenizer.json of byte-level BPE; brings no torch
    "webdataset>=1.0",
    "tensorboard>=2.16",
    "tqdm>=4.60",
    "psutil>=5.9",  # without it megatron-core's checkpoint writers hang
    "einops>=0.8",
    "packaging>=23",
    "safetensors>=0.4.5",
    "matplotlib>=3.8",
]

extras = {
    "cpu": ["torch==2.13.0"],
    "gpu": ["torch>=2.11,<2.12", "setuptools<82"],
    # After `gpu`, with --no-build-isolation: compiled against the installed torch. Never on a machine without CUDA.
    "te": ["transformer-engine[pytorch,core_cu13]==2.20.2"],
    "fp8": ["torchao==0.18.0"],
    "dali": ["nvidia-dali-cuda130>=2,<3; sys_platform == 'linux'"],  # decodes on the CPU as well, without a driver
    "liger": ["liger-kernel==0.8.5"],
    "fa": ["flash-attn-4>=4.0.0b36"],
    "hf": ["transformers==5.23.0"],  # to compare exports with what they are for; training needs none of it
    "evaluate": ["openpyxl>=3.1,<4"],  # MMBench's server takes nothing but a sheet
    "serve": ["starlette>=1.0,<2", "uvicorn>=0.30,<1", "h11>=0.14", "prometheus-client>=0.20,<1"],
    "dev": [
        "pytest>=8",
        "transformers==5.23.0",
        "peft==0.21.2",  # merges of adapters are compared with its own
        "ninja",
        "nvidia-cuda-cuobjdump",
        "nvidia-cuda-nvdisasm",
        "openai>=2,<4",
        "httpx>=0.27",
        "playwright>=1.50",
        "openpyxl>=3.1,<4",
        "ruff==0.17.6",
        "mypy==2.4.1",
        "mypy-baseline==0.7.4",
        "types-PyYAML",
        "pytest-xdist>=3.6",
    ],
}

# By tools/build_ops.py; needs no particular Python, but this kind of machine.
prebuilt = root / "megatron_share4v/ops/prebuilt/share4v_ops.so"
platform = {"bdist_wheel": {"plat_name": re.sub("[-.]", "_", sysconfig.get_platform())}} if prebuilt.exists() else {}


class BuildWithSources(build_py):
    """Copy csrc/ into the wheel, whose ops are compiled at first use; a checkout uses its own csrc/."""

    def run(self) -> None:
        """Build as usual; then copy csrc/, unless the installation is editable."""
        super().run()
        if not getattr(self, "editable_mode", False):
            shutil.copytree(root / "csrc", Path(self.build_lib) / "megatron_share4v/csrc", dirs_exist_ok=True)


setup(
    name="megatron_share4v",
    version=version,
    description="3D-parallel training of ShareGPT4V-style vision-language models on megatron-core",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="The megatron_share4v authors",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_share4v", "megatron_share4v.*"]),
    package_data={"megatron_share4v": ["serve/*.html", "ops/prebuilt/*"]},
    cmdclass={"build_py": BuildWithSources},
    options=platform,
    install_requires=requirements,
    extras_require=extras,
)
