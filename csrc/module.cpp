// Host utilities of the CPU half (pybind11, no torch headers); its ops are in bindings.cpp.
#include <pybind11/pybind11.h>

#include "stash_tile.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "Host utilities of protoclip's native library.";
  m.def("stash_tile",
        [] { return pybind11::make_tuple(protoclip::kStashRows, protoclip::kStashColumns); });
  m.def("cpu_features", [] {
    pybind11::dict out;  // what -march=native let the compiler use
#ifdef __AVX2__
    out["avx2"] = true;
#endif
#ifdef __AVX512F__
    out["avx512f"] = true;
#endif
#ifdef __AVX512VNNI__
    out["avx512_vnni"] = true;
#endif
#ifdef __AVX512BF16__
    out["avx512_bf16"] = true;
#endif
#ifdef __AMX_BF16__
    out["amx_bf16"] = true;
#endif
    return out;
  });
}
