// A script of a store's life, and the model of what must be stored after each of its steps.

#ifndef CERTIQ_TESTS_STORE_STORE_SCRIPT_H_
#define CERTIQ_TESTS_STORE_STORE_SCRIPT_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "store/storage.h"
#include "store/store_examples.h"

namespace certiq::server::testing {

struct Model {
  std::map<std::string, CalibrationRecord> calibrations;
  std::map<std::string, JobRecord> jobs;
};

// A storage and what it was told.
struct Scene {
  Catalog* catalog = nullptr;
  const Storage* storage = nullptr;
  // The calls that returned OK.
  Model model;
  // Blobs that steps hand on to later ones.
  std::map<std::string, BlobRef> blobs;
};

// The calls of the desks for two calibrations and three jobs, in their order. At most one change of
// a record each; those that failed may be repeated.
using Step = absl::Status (*)(Scene&);
const std::vector<Step>& Script();

// Whether `state` is what a start makes of `model`, up to the names of blobs.
bool IsModel(const StoredState& state, const Model& model);

// Starts on the storage in `data_dir` with nothing in the way, and expects it to hold one of
// `models`, every tensor that a record names, and no other file.
void ExpectStored(const std::string& data_dir, const std::vector<Model>& models,
                  const std::string& when);

}  // namespace certiq::server::testing

#endif  // CERTIQ_TESTS_STORE_STORE_SCRIPT_H_
