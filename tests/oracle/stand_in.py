"""Build libraries that stand in for CUDA's, so that torch's CUDA build runs without a GPU.

What torch itself decides then is torch's own doing: what its caching allocator reserves, which
attention kernel it takes, what its ops allocate. What kernels compute is not there.
"""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent

# Functions outside of the runtime that must do more than to return 0.
_SPECIAL = {
    "cudnnGetVersion": "unsigned long cudnnGetVersion(void) { return 92000; }",
    "cudnnGetProperty": (
        "int cudnnGetProperty(int which, int* value)"
        " { return *value = which == 0 ? 9 : which == 1 ? 20 : 0, 0; }"
    ),
    "cudnnCreate": "int cudnnCreate(void** handle) { return *handle = (void*)8, 0; }",
    "cublasCreate_v2": (
        "int cublasCreate_v2(void** handle)"
        " { static long next = 0; return *handle = (void*)(next += 8), 0; }"
    ),
    "cublasLtCreate": "int cublasLtCreate(void** handle) { return *handle = (void*)8, 0; }",
    "cublasLtMatmulAlgoGetHeuristic": (
        "int cublasLtMatmulAlgoGetHeuristic(void* a, void* b, void* c, void* d, void* e, void* f,"
        " void* g, int n, void* results, int* found) { return *found = 1, 0; }"
    ),
}
_DRIVER = {  # Triton's: linked by what it compiles, or looked up by name
    "cuCtxGetLimit",
    "cuCtxSetCurrent",
    "cuCtxSetLimit",
    "cuFuncSetAttribute",
    "cuFuncSetCacheConfig",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuModuleUnload",
    "cuOccupancyMaxActiveClusters",
    "cuTensorMapEncodeTiled",
}
_NVML = {  # looked up by name when they are needed
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGpuFabricInfoV",
    "nvmlDeviceGetHandleByPciBusId_v2",
    "nvmlDeviceGetNvLinkRemoteDeviceType",
    "nvmlDeviceGetNvLinkRemotePciInfo_v2",
    "nvmlInit_v2",
    "nvmlSystemGetCudaDriverVersion_v2",
}


def build_stand_in(torch_directory: Path, cuda_headers: Path, target: Path) -> None:
    """Write a library into ``target`` for each of CUDA's that torch's libraries need.

    Args:
        torch_directory: The ``torch`` of an unpacked wheel.
        cuda_headers: Where ``cuda_runtime_api.h`` is.
        target: An existing directory.
    """
    files = sorted((torch_directory / "lib").glob("*.so*"))
    dynamic = subprocess.check_output(["readelf", "-d", *files], text=True)
    needed = set(re.findall(r"\[(lib(?:cu|nccl|nv)[^]]+)\]", dynamic))
    symbols = subprocess.check_output(["nm", "-D", *files], text=True)
    defined = set(re.findall(r" [A-TV-Z] (\w+)", symbols))
    # Symbols with a version belong to a library; the others may be anywhere, and are in libcuda.
    wanted: dict[str, set[str]] = defaultdict(set)
    for symbol, version in re.findall(r" U ((?:__)?(?:cu|nccl|nv)\w+)(?:@(\S+))?", symbols):
        if version or symbol not in defined:
            wanted[version].add(symbol)
    for library in sorted(needed - {file.name for file in files}):
        version = "NVSHMEM" if "nvshmem" in library else library
        if library.startswith("libcudart"):
            part = compile_part("runtime", cuda_headers, target)
        elif library.startswith("libcuda."):
            version = ""
            part = compile_part("driver", cuda_headers, target)
            wanted[version] |= _DRIVER
        else:
            part = None
        write_library(target, library, version, wanted[version], part)
    write_library(target, "libnvidia-ml.so.1", "", _NVML)


def compile_part(name: str, cuda_headers: Path, target: Path) -> tuple[str, set[str]]:
    """Compile a source beside this file; return the object's name and what it defines."""
    compile_cpp(
        ["-c", "-fPIC", f"-I{cuda_headers}", HERE / f"{name}.cpp", "-o", f"{name}.o"], target
    )
    listing = subprocess.check_output(["nm", "--defined-only", target / f"{name}.o"], text=True)
    return f"{name}.o", set(re.findall(r" T ((?:__)?cu\w+)", listing))


def write_library(
    target: Path,
    library: str,
    version: str,
    names: set[str],
    part: tuple[str, set[str]] | None = None,
) -> None:
    """Build one library whose functions succeed and do nothing, but for those of an object."""
    objects, defined = ([part[0]], part[1]) if part else ([], set())
    source = target / f"{library}.c"
    source.write_text(
        "\n".join(
            _SPECIAL.get(n, f"long {n}(void) {{ return 0; }}") for n in sorted(names - defined)
        )
        + "\n"
    )
    subprocess.run(
        ["gcc", "-c", "-fPIC", "-w", source, "-o", f"{library}.o"], cwd=target, check=True
    )
    options = [f"-Wl,-soname,{library}", "-o", library, f"{library}.o"]
    if version and names | defined:
        exported = "; ".join(sorted(names | defined))
        (target / f"{library}.map").write_text(f"{version} {{ global: {exported}; }};\n")
        options.append(f"-Wl,--version-script={library}.map")
    compile_cpp(["-shared", *options, *objects], target)


def compile_cpp(arguments: list[str | Path], directory: Path) -> None:
    """Run the C++ compiler, silently unless it fails."""
    subprocess.run(["g++", "-w", *arguments], cwd=directory, check=True)


def make_environment(stand_in: Path, torch_directory: Path, **settings: object) -> dict[str, str]:
    """Return the environment in which a Python of the wheel's version runs on the stand-in.

    Args:
        stand_in: Where `build_stand_in` wrote.
        torch_directory: The ``torch`` of an unpacked wheel.
        settings: What runtime.cpp reads, as in ``capability="86"``; None leaves it at its default.
    """
    return {
        "LD_LIBRARY_PATH": str(stand_in),
        # torch's libraries look for a runtime beside themselves first; one that is loaded is taken.
        "LD_PRELOAD": " ".join(
            map(str, [stand_in / "libcuda.so.1", *stand_in.glob("libcudart.so.??")])
        ),
        "PYTHONPATH": str(torch_directory.parent),
        "PYTHONWARNINGS": "ignore",
    } | {f"STAND_IN_{k.upper()}": str(v) for k, v in settings.items() if v is not None}
