#include "calibration/gram_transfer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "base/status_macros.h"

namespace certiq::server {
namespace {

using base::InvalidField;
using engine::UpperTriangle;

// What float32 sums over many tokens may be off by, generously.
constexpr double kAsymmetry = 1e-5;
constexpr double kBeyondCauchySchwarz = 1e-3;

// 2^40 products of float32 are far below; sums and differences of such numbers stay finite.
constexpr double kLargest = 1e100;

constexpr const char* kNames[] = {"X^T X", "X~^T X~", "X~^T X"};

double Symmetric(const UpperTriangle<double>& triangle, int64_t i, int64_t j) {
  return i <= j ? triangle.at(i, j) : triangle.at(j, i);
}

std::string Place(const char* name, int64_t i, int64_t j) {
  return absl::StrCat(name, ", row ", i, ", column ", j);
}

absl::Status CheckPossible(const char* name, const UpperTriangle<double>& sums) {
  const int64_t n = sums.size();
  for (int64_t i = 0; i < n; ++i) {
    if (sums.at(i, i) < 0) {
      return InvalidField("data", absl::StrCat("expected a diagonal of at least 0, got ",
                                               sums.at(i, i), " in ", Place(name, i, i)));
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i + 1; j < n; ++j) {
      const double limit = std::sqrt(sums.at(i, i)) * std::sqrt(sums.at(j, j));
      if (std::abs(sums.at(i, j)) <= (1 + kBeyondCauchySchwarz) * limit) continue;
      return InvalidField(
          "data", absl::StrCat("expected at most sqrt(H_ii H_jj) = ", limit, " in magnitude, got ",
                               sums.at(i, j), " in ", Place(name, i, j)));
    }
  }
  return absl::OkStatus();
}

}  // namespace

StatisticsImport::StatisticsImport(int64_t features, bool mismatched, engine::DType dtype,
                                   MatrixLayout layout)
    : features_(features), mismatched_(mismatched), dtype_(dtype), layout_(layout), x_(features) {
  if (!mismatched) return;
  sums_.gram = UpperTriangle<double>(features);
  sums_.mismatch.emplace().cross.resize(static_cast<size_t>(features * features));
}

int64_t StatisticsImport::BytesFor(int64_t features, bool mismatched) {
  return engine::StatisticsAccumulator::BytesFor(features, mismatched);
}

UpperTriangle<double>& StatisticsImport::triangle() { return part_ == Part::kX ? x_ : sums_.gram; }

void StatisticsImport::NextRow() {
  ++row_;
  const bool triangular = layout_ == MatrixLayout::kUpper && part_ != Part::kCross;
  column_ = triangular ? row_ : 0;
  if (row_ < features_) return;
  row_ = column_ = 0;
  part_ = !mismatched_ ? Part::kEnd : static_cast<Part>(static_cast<int>(part_) + 1);
}

absl::Status StatisticsImport::Take(double value) {
  if (part_ == Part::kEnd) {
    return InvalidField("data", "expected no more bytes: all sums that the header announces came");
  }
  const char* const name = kNames[static_cast<int>(part_)];
  if (!(std::abs(value) <= kLargest)) {
    return InvalidField("data", absl::StrCat("expected finite numbers up to ", kLargest, ", got ",
                                             value, " in ", Place(name, row_, column_)));
  }
  if (part_ == Part::kCross) {
    sums_.mismatch->cross[static_cast<size_t>(row_ * features_ + column_)] = value;
  } else if (column_ >= row_) {
    triangle().at(row_, column_) = value;
  } else {
    // The transposed element came before, and so did one of the two diagonals.
    const double other = triangle().at(column_, row_);
    const double size = std::max(std::abs(value), std::abs(other));
    if (std::abs(value - other) > kAsymmetry * size &&
        std::abs(value - other) > kAsymmetry * std::abs(triangle().at(column_, column_))) {
      return InvalidField("data", absl::StrCat("expected a symmetric matrix, got ", value,
                                               " where the transposed element is ", other, " in ",
                                               Place(name, row_, column_)));
    }
  }
  if (++column_ == features_) NextRow();
  return absl::OkStatus();
}

absl::Status StatisticsImport::Append(std::span<const std::byte> bytes) {
  const auto item = static_cast<size_t>(engine::ItemSize(dtype_));
  if (bytes.empty() || bytes.size() % item != 0) {
    return InvalidField("data", absl::StrCat("expected a whole number of elements of ", item,
                                             " bytes, at least one, got ", bytes.size(), " bytes"));
  }
  for (size_t at = 0; at < bytes.size(); at += item) {
    double value = 0;
    if (dtype_ == engine::DType::kF64) {
      std::memcpy(&value, bytes.data() + at, sizeof(value));
    } else {
      float narrow = 0;
      std::memcpy(&narrow, bytes.data() + at, sizeof(narrow));
      value = narrow;
    }
    RETURN_IF_ERROR(Take(value));
  }
  return absl::OkStatus();
}

absl::Status StatisticsImport::CheckCross() const {
  const std::vector<double>& cross = sums_.mismatch->cross;
  for (int64_t i = 0; i < features_; ++i) {
    for (int64_t j = 0; j < features_; ++j) {
      const double value = cross[static_cast<size_t>(i * features_ + j)];
      const double limit = std::sqrt(sums_.gram.at(i, i)) * std::sqrt(x_.at(j, j));
      if (std::abs(value) <= (1 + kBeyondCauchySchwarz) * limit) continue;
      return InvalidField(
          "data", absl::StrCat("expected at most sqrt((X~^T X~)_ii (X^T X)_jj) = ", limit,
                               " in magnitude, got ", value, " in ", Place(kNames[2], i, j)));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<engine::Statistics> StatisticsImport::Finish(int64_t tokens) {
  if (part_ != Part::kEnd) {
    return InvalidField("data",
                        absl::StrCat("expected more bytes: the stream ended in ",
                                     Place(kNames[static_cast<int>(part_)], row_, column_)));
  }
  RETURN_IF_ERROR(CheckPossible(kNames[0], x_));
  if (mismatched_) {
    RETURN_IF_ERROR(CheckPossible(kNames[1], sums_.gram));
    RETURN_IF_ERROR(CheckCross());
  }
  sums_.tokens = tokens;
  if (!mismatched_) {
    sums_.gram = std::move(x_);
    return std::move(sums_);
  }
  // With G = X~^T X: P^T P = X^T X - G - G^T + X~^T X~ and P^T X~ = G^T - X~^T X~.
  std::vector<double>& cross = sums_.mismatch->cross;
  const int64_t n = features_;
  const auto g = [&](int64_t i, int64_t j) -> double& {
    return cross[static_cast<size_t>(i * n + j)];
  };
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = i; j < n; ++j) {
      const double h = sums_.gram.at(i, j);
      x_.at(i, j) += h - g(i, j) - g(j, i);
      const double upper = g(j, i) - h;
      g(j, i) = g(i, j) - h;
      g(i, j) = upper;
    }
    // Rounding may leave less than nothing of inputs that hardly differ.
    x_.at(i, i) = std::max(0.0, x_.at(i, i));
  }
  sums_.mismatch->residual = std::move(x_);
  return std::move(sums_);
}

StatisticsExport::StatisticsExport(engine::SharedStatistics sums, int64_t features, bool mismatched,
                                   MatrixLayout layout)
    : sums_(std::move(sums)), features_(features), parts_(mismatched ? 3 : 1), layout_(layout) {}

double StatisticsExport::At(int part, int64_t i, int64_t j) const {
  if (sums_ == nullptr) return 0;
  const double h = Symmetric(sums_->gram, i, j);
  if (part == 1 || !sums_->mismatch.has_value()) return h;
  const std::vector<double>& cross = sums_->mismatch->cross;
  const double transposed = cross[static_cast<size_t>(j * features_ + i)];
  if (part == 2) return transposed + h;
  return Symmetric(sums_->mismatch->residual, i, j) +
         cross[static_cast<size_t>(i * features_ + j)] + transposed + h;
}

void StatisticsExport::Next(int64_t count, std::vector<double>& values) {
  values.clear();
  while (part_ < parts_ && static_cast<int64_t>(values.size()) < count) {
    const bool triangular = layout_ == MatrixLayout::kUpper && part_ != 2;
    for (int64_t j = triangular ? row_ : 0; j < features_; ++j) {
      values.push_back(At(part_, row_, j));
    }
    if (++row_ == features_) {
      row_ = 0;
      ++part_;
    }
  }
}

}  // namespace certiq::server
