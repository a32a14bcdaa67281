// Files that the views of a model read: batches and noise.
#pragma once

#include <torch/torch.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "libs/world_model/world_model.h"

namespace orrery {

// Where noise comes from: a generator, a file, or, with neither, zeros.
struct InspectNoise {
  c10::optional<torch::Generator> generator;
  c10::optional<TensorMap> file;
};

// "zero", a seed, or the path of a file.
absl::StatusOr<InspectNoise> OpenNoise(const std::string& text);
// `name` of the file, which must have this shape, drawn (standard normal, or uniform in [0, 1)), or zeros.
absl::StatusOr<torch::Tensor> TakeNoise(InspectNoise& noise, const std::string& name, std::vector<int64_t> shape,
                                        bool uniform = false);

// Undefined when there is none.
torch::Tensor FindTensor(const TensorMap& tensors, const std::string& name);
// INVALID_ARGUMENT naming path and tensor unless it is there, not empty and of so many dimensions.
absl::Status CheckLeading(const torch::Tensor& x, int64_t dims, absl::string_view name, const std::string& path);

// A batch [T, B, …], or the rows of one episode [T, …] (`orrery inspect replay --out`), which become a batch of one. Images as uint8
// go through the model's preprocessing, with noise only from a seed; everything else is taken as it is. What the model
// does not know is left out; reward, is_first and is_terminal may be missing.
absl::StatusOr<Batch> LoadBatch(const std::string& path, const WorldModel& model, const InspectNoise& noise);

}  // namespace orrery
