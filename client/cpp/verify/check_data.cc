#include <algorithm>
#include <cmath>
#include <map>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "checks.h"

namespace certiq::verify {
namespace {

// Static groups belong to the original columns; dynamic ones are runs of group_size in the order of
// work, the last one perhaps shorter.
void CheckGroups(const Evidence& evidence, VerificationReport& report) {
  const int64_t size = evidence.spec().group_size();
  if (size == 0) return;
  const Layer& layer = evidence.layer;
  const bool runs = evidence.spec().group_scales() == v1::GROUP_SCALES_DYNAMIC;
  bool holds = true;
  for (size_t i = 0; i < layer.order.size(); ++i) {
    // layer.order sorts by group first where groups are runs, so that this leaves norms to check.
    const auto feature = static_cast<size_t>(runs ? layer.order[i] : static_cast<int64_t>(i));
    holds = holds && layer.q.group_of[feature] == static_cast<int64_t>(i) / size;
    if (!runs || i == 0) continue;
    const bool natural = evidence.spec().order() != v1::ORDER_DECREASING_NORM;
    const auto before = layer.order[i - 1];
    const auto here = layer.order[i];
    // Norms within 1e-5 may have changed places in float32 sums.
    holds = holds && (natural || layer.gram(here, here) <= layer.gram(before, before) * (1 + 1e-5));
  }
  report.Claim("groups", holds,
               runs ? "runs of group_size in the order of work" : "runs of original columns");
}

// Every code is the nearest one, or one of the two around the target, or an outermost one.
void CheckRounding(const Evidence& evidence, VerificationReport& report) {
  if (evidence.certificate.has_polish()) {
    report.NotChecked("codes",
                      "each in its grid; polish moved them away from where they were rounded");
    return;
  }
  const Quantized& q = evidence.layer.q;
  const auto [least, most] = std::minmax_element(q.codes.begin(), q.codes.end());
  // Rounded levels lie at most half a unit of bfloat16 off their multiple.
  const double level_rounding = q.level_type == v1::DATA_TYPE_F32 ? 0 : 0x1p-8;
  int64_t strange = 0;
  for (Eigen::Index r = 0; r < evidence.e.rows(); ++r) {
    for (Eigen::Index i = 0; i < evidence.e.cols(); ++i) {
      // Zeros whatever the target.
      if (q.Vanishes(r, evidence.Feature(i))) continue;
      const int32_t code = q.Code(r, evidence.Feature(i));
      // An explicit grid may have used fewer codes.
      if (code == 0 || code == q.top || code == *least || code == *most) continue;
      const double reach =
          (evidence.nearest() ? 0.5 : 1.0) * evidence.Step(r, i) * (1 + 1e-5) +
          evidence.ErrorSlack(r, i) +
          level_rounding * (std::abs(q.levels(r, evidence.Feature(i))) + evidence.Step(r, i));
      strange += std::abs(evidence.e(r, i)) <= reach ? 0 : 1;
    }
  }
  report.Claim(
      "codes", strange == 0,
      strange == 0
          ? absl::StrCat("each in its grid and ",
                         evidence.nearest() ? "the nearest to its target" : "next to its target")
          : absl::StrCat(strange, " are not what ", v1::Rounding_Name(evidence.spec().rounding()),
                         " gives in this order"));
}

// Which groups became zeros: the stored result shows them all, the certificate names some.
void CheckUnderflow(const Evidence& evidence, VerificationReport& report) {
  constexpr int64_t kNamedRows = 16;
  const v1::Underflow& underflow = evidence.certificate.underflow();
  const Quantized& q = evidence.layer.q;
  int64_t groups = 0;
  int64_t rows = 0;
  std::vector<int64_t> named;
  for (int64_t r = 0; r < q.rows; ++r) {
    const auto first = q.vanishes.begin() + r * q.groups;
    const int64_t here = std::count(first, first + q.groups, 1);
    if (here == 0) continue;
    groups += here;
    if (rows++ < kNamedRows) named.push_back(r);
  }
  report.Count("underflow.groups", underflow.groups(), groups, groups);
  report.Count("underflow.rows", underflow.rows(), rows, rows);
  report.Claim("underflow.first_rows",
               std::equal(named.begin(), named.end(), underflow.first_rows().begin(),
                          underflow.first_rows().end()),
               absl::StrCat("[", absl::StrJoin(underflow.first_rows(), ", "), "]"));
}

}  // namespace

namespace {

// certificate.proto, held_out_rows.
constexpr Eigen::Index kLeastSampledRows = 64;
constexpr Eigen::Index kMostSampledRows = 256;

}  // namespace

double Evidence::ErrorSlack(Eigen::Index r, Eigen::Index i) const {
  const double w = std::abs(layer.live_w(r, Feature(i)));
  const double v = std::abs(Target(r, i));
  const double slack = feedback.has_value() ? feedback->slack : 0;
  return 0x1p-21 * (v + w) + slack * std::abs(v + w) + 0x1p-21 * Step(r, i);
}

std::vector<Range> FormRoundings(const Evidence& evidence, bool energies) {
  const Layer& layer = evidence.layer;
  // Sums of float64, of tokens and of features; and products of float32, of factors that are
  // rounded too: (12 + 4) of a sum, 2 of the factors, 2 of W - Q.
  const double wide =
      0x1p-53 * static_cast<double>(evidence.certificate.tokens() + 2 * layer.w.cols() + 16);
  constexpr double kNarrow = 20 * 0x1p-24;
  const Vector inputs = layer.gram.diagonal().cwiseSqrt();
  Vector residual = Vector::Zero(inputs.size());
  if (evidence.mismatched()) {
    residual = (layer.fit.x - *layer.fit.x_quantized).colwise().norm().transpose();
  }
  std::vector<Range> ranges;
  for (Eigen::Index r = 0; r < layer.w.rows(); ++r) {
    double reach = 0;
    for (Eigen::Index j = 0; j < layer.w.cols(); ++j) {
      const double change = energies ? layer.w(r, j) : layer.live_w(r, j) - layer.q.levels(r, j);
      reach += std::abs(change) * inputs[j] + std::abs(layer.w(r, j)) * residual[j];
    }
    const double square = reach * reach;
    ranges.push_back({wide * square * (1 - kPromise), (kNarrow + wide) * square * (1 + kPromise)});
  }
  return ranges;
}

void CheckData(const Evidence& evidence, VerificationReport& report) {
  const v1::Certificate& c = evidence.certificate;
  const Layer& layer = evidence.layer;
  report.Count("tokens", c.tokens(), layer.fit.x.rows(), layer.fit.x.rows());
  report.Count("held_out_tokens", c.held_out_tokens(), layer.held_out.x.rows(),
               layer.held_out.x.rows());
  // Held-out damping measures on a sample of rows.
  const Eigen::Index rows = layer.w.rows();
  const bool measured = layer.held_out.x.rows() > 0;
  const Eigen::Index sampled =
      std::min(rows, std::clamp(rows / 8, kLeastSampledRows, kMostSampledRows));
  const Eigen::Index measured_rows = !measured ? 0 : layer.held_out_damping ? sampled : rows;
  report.Count("held_out_rows", c.held_out_rows(), measured_rows, measured_rows);
  report.Claim(
      "held_out_fraction, held_out_block_rows", true,
      layer.held_out.x.rows() == 0 ? "nothing was held out" : "rows were held out by their rule");
  const auto dead = std::count(layer.dead.begin(), layer.dead.end(), true);
  report.Count("dead_features", c.dead_features(), dead, dead);
  CheckGroups(evidence, report);
  CheckRounding(evidence, report);
  CheckUnderflow(evidence, report);
  if (evidence.feedback.has_value() && evidence.feedback->swapped > 0) {
    report.NotChecked("order", absl::StrCat(evidence.feedback->swapped,
                                            " neighbours of equal norm to 2e-6 were worked on the "
                                            "other way round"));
  }
}

}  // namespace certiq::verify
