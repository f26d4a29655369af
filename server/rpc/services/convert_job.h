// Jobs of the contract and of jobs/.

#ifndef CERTIQ_RPC_SERVICES_CONVERT_JOB_H_
#define CERTIQ_RPC_SERVICES_CONVERT_JOB_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "certiq/v1/job_service.pb.h"
#include "job/codec.h"
#include "job/job_manager.h"

namespace certiq::server {

// Names, spec and shape are checked here, sizes by JobManager.
absl::StatusOr<JobRequest> FromProto(const v1::CreateJobHeader& header);
v1::Job ToProto(const JobView& view);

// The contract's messages as what is stored.
class JobCodec final : public Codec {
 public:
  absl::StatusOr<engine::ResolvedSpec> DecodeSpec(const std::string& spec) const override;
  std::string EncodeError(const absl::Status& error) const override;
  std::string EncodeHeader(const std::vector<engine::ResultTensor>& tensors) const override;
  std::vector<std::string> EncodeCertificate(const engine::LayerCertificate& certificate,
                                             const CallFacts& facts) const override;
};

}  // namespace certiq::server

#endif  // CERTIQ_RPC_SERVICES_CONVERT_JOB_H_
