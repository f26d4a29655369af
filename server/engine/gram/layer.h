// A layer: as it comes to the engine, and in working order.

#ifndef CERTIQ_ENGINE_GRAM_LAYER_H_
#define CERTIQ_ENGINE_GRAM_LAYER_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "engine/gram/form_rounding.h"
#include "engine/gram/gram.h"
#include "engine/gram/quadratic_form.h"
#include "engine/kernels/strip_matrix.h"
#include "engine/linalg/damped_factor.h"
#include "engine/run_context.h"
#include "engine/spec.h"

namespace certiq::engine {

// A layer to quantize. The computation consumes the weights, and lets go of the sums.
struct LayerProblem {
  // REQUIRES: it suits the layer's size: an explicit grid has one scale (and, asymmetric, one zero
  // point) for each row and group; GPTQ formats have rows x bits and features x bits divisible by
  // 32; packed formats have groups that divide the features.
  ResolvedSpec spec;
  // W [R, N].
  StripMatrix weights;
  // Sums over the calibration tokens, N features. Not null.
  SharedStatistics statistics;
  // Sums over tokens that were held out (V1), of the same kind; may be null.
  SharedStatistics held_out = nullptr;
  // Shared by the layers that use these sums; may be null, else outlives the call.
  FactorCache* factors = nullptr;
  // What errors call the sums by: the calibration's id; empty where there is none.
  std::string calibration = "";
};

// A layer with its features in the order in which they are rounded.
struct WorkingLayer {
  // Element i: the original feature at place i; empty: natural.
  std::vector<int64_t> order;
  // Features whose X~ is all zero (D3).
  std::vector<bool> dead;
  SharedStatistics sums;
  // Where factors of these sums are kept; null: nowhere. What they are in it: see FactorKey.
  FactorCache* factors = nullptr;
  bool with_held_out = false;
  // W as it came, and with zeros at dead features (empty where there are none: use reference).
  StripMatrix reference;
  StripMatrix zeroed;
  // The row of the whole layer that each row is, where it has some of them only; empty: all.
  std::vector<int64_t> row_names;
  // Where inputs are mismatched: of `reference`, once a method has needed it.
  std::optional<InitialError> initial;

  const Statistics& statistics() const { return *sums; }
  // What row r is called in messages.
  int64_t RowName(int64_t r) const {
    return row_names.empty() ? r : row_names[static_cast<size_t>(r)];
  }
  bool mismatched() const { return sums->mismatch.has_value(); }
  // Whether `reference` outlives the method: errors are told from it where inputs are mismatched,
  // and where float32 differences W - Q would lose what massive tokens leave.
  bool KeepsReference() const { return mismatched() || HasMassiveTokens(*sums); }
  const StripMatrix& weights() const { return zeroed.rows() > 0 ? zeroed : reference; }
  const InitialError* initial_error() const { return initial.has_value() ? &*initial : nullptr; }
};

// Finds order and dead features and brings everything into that order.
WorkingLayer MakeWorkingLayer(const ResolvedSpec& spec, SharedStatistics sums, StripMatrix weights,
                              const RunContext& context);

}  // namespace certiq::engine

#endif  // CERTIQ_ENGINE_GRAM_LAYER_H_
