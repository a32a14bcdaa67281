// Text proto with errors as statuses. For the files of this folder.
#pragma once

#include <google/protobuf/io/tokenizer.h>
#include <google/protobuf/text_format.h>

#include <string>

#include "absl/status/status.h"

namespace orrery {

// Keeps the first error. The position counts from 1.
class FirstError : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, google::protobuf::io::ColumnNumber column, const std::string& message) override;
  // "line 3, column 5: …", or empty.
  const std::string& text() const { return text_; }
  // The same without the position.
  const std::string& message() const { return message_; }

 private:
  std::string text_;
  std::string message_;
};

// Replaces `message` by what `text` says. INVALID_ARGUMENT with line and column; unknown fields are errors.
absl::Status ParseText(const std::string& text, google::protobuf::Message& message);

}  // namespace orrery
