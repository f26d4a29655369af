// Jobs of the contract and of jobs/.

#ifndef CERTIQ_RPC_CONVERT_JOB_H_
#define CERTIQ_RPC_CONVERT_JOB_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "certiq/v1/job_service.pb.h"
#include "jobs/codec.h"
#include "jobs/job_manager.h"

namespace certiq::rpc {

// Names, spec and shape are checked here, sizes by jobs::JobManager.
absl::StatusOr<jobs::JobRequest> FromProto(const v1::CreateJobHeader& header);
v1::Job ToProto(const jobs::JobView& view);

// The contract's messages as what is stored.
class JobCodec final : public jobs::Codec {
 public:
  absl::StatusOr<engine::ResolvedSpec> DecodeSpec(const std::string& spec) const override;
  std::string EncodeError(const absl::Status& error) const override;
  std::string EncodeHeader(const std::vector<engine::ResultTensor>& tensors) const override;
  std::vector<std::string> EncodeCertificate(const engine::LayerCertificate& certificate,
                                             const jobs::CallFacts& facts) const override;
};

}  // namespace certiq::rpc

#endif  // CERTIQ_RPC_CONVERT_JOB_H_
