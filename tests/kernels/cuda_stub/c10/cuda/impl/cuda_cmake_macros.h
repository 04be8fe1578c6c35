// A CUDA torch generates this header; a CPU torch lacks it. For the compile check of the bindings.
#pragma once
#define C10_CUDA_BUILD_SHARED_LIBS
