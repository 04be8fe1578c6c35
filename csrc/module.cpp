// Host utilities of the native library (pybind11, no torch headers). The ops themselves are
// registered by each op's own file with TORCH_LIBRARY_FRAGMENT(protoclip_native, m).
#include <pybind11/pybind11.h>

#include <string>

namespace {

struct CpuFeatures {
  bool avx2, avx512, avx512_bf16, amx_bf16;
};

CpuFeatures cpu_features() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  unsigned eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return {__builtin_cpu_supports("avx2") != 0, __builtin_cpu_supports("avx512f") != 0,
          __builtin_cpu_supports("avx512bf16") != 0, (edx >> 22 & 1) != 0};
#else
  return {false, false, false, false};
#endif
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Host utilities of protoclip's native library.";
  m.def("cpu_features", [] {
    const CpuFeatures f = cpu_features();
    pybind11::dict out;
    out["avx2"] = f.avx2;
    out["avx512"] = f.avx512;
    out["avx512_bf16"] = f.avx512_bf16;
    out["amx_bf16"] = f.amx_bf16;
    return out;
  });
  m.def("build_info", [] {
    pybind11::dict out;
    out["compiler"] = std::string(__VERSION__);
#ifdef CPU_CAPABILITY_AVX512
    out["vectors"] = "AVX512";
#elif defined(CPU_CAPABILITY_AVX2)
    out["vectors"] = "AVX2";
#else
    out["vectors"] = "default";
#endif
    return out;
  });
}
