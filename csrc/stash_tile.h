// The tile of the stash, which ops/stash.py asks for: no torch headers.
#pragma once

#include <cstdint>

namespace protoclip {

constexpr int64_t kStashRows = 128, kStashColumns = 256;  // 128 KB of fp32

}  // namespace protoclip
