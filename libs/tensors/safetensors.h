// The safetensors format: 8 bytes of header length (little endian), a JSON header, raw tensors.
// https://github.com/huggingface/safetensors. Every offset is checked: a damaged file is an error, never a crash.
#pragma once

#include <torch/torch.h>

#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace orrery {

struct SafeTensors {
  std::map<std::string, torch::Tensor> tensors;  // on CPU, contiguous, own their memory
  std::map<std::string, std::string> metadata;   // `__metadata__`
};

// DATA_LOSS naming the tensor or header field that is wrong. Types: U8, I32, I64, F32, F64, BOOL (read as uint8), BF16, F16.
absl::StatusOr<SafeTensors> ParseSafeTensors(absl::string_view bytes);
absl::StatusOr<std::string> SerializeSafeTensors(const SafeTensors& contents);

// Errors name the path.
absl::StatusOr<SafeTensors> LoadSafeTensors(const std::string& path);
// Written to a temporary file, synced and renamed.
absl::Status SaveSafeTensors(const std::string& path, const SafeTensors& contents);

}  // namespace orrery
