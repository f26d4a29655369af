// Metrics, scraped over HTTP.

#include "observability/metrics.h"

#include <gtest/gtest.h>

#include <chrono>
#include <string>

#include "observability/http_server.h"
#include "support/requests.h"
#include "support/text.h"
#include "test_server.h"

namespace certiq::testing {
namespace {

const std::string kCall =
    R"(grpc_method="Quantize",grpc_service="certiq.v1.QuantizationService",grpc_type="bidi_stream")";

std::string Handled(const std::string& code) {
  return "grpc_server_handled_total{grpc_code=\"" + code + "\"," + kCall + "}";
}

TEST(MetricsTest, EverySeriesIsThereFromTheStart) {
  const TestServer server({.workers = 3, .queue_limit = 5, .budget = 1000});
  for (const char* series :
       {R"(certiq_jobs{state="queued"})",
        R"(certiq_jobs{state="expired"})",
        R"(certiq_jobs_total{method="optq",outcome="succeeded"})",
        R"(certiq_jobs_total{method="qronos",outcome="expired"})",
        R"(certiq_job_seconds_count{method="optq",phase="queue"})",
        R"(certiq_job_seconds_count{method="nearest",phase="pack"})",
        R"(certiq_job_seconds_count{method="qronos",phase="reference"})",
        R"(certiq_job_duration_seconds_count{method="qronos",outcome="failed"})",
        "certiq_drain_start_time_seconds",
        "certiq_queue_depth",
        "certiq_workers_busy",
        R"(certiq_weights_quantized_total{bits="2",method="optq"})",
        R"(certiq_weights_quantized_total{bits="8",method="nearest"})",
        "certiq_activation_rows_total",
        "certiq_activation_bytes_total",
        R"(certiq_flops_total{phase="statistics"})",
        R"(certiq_flops_total{phase="factor"})",
        R"(certiq_flops_total{phase="round"})",
        R"(certiq_lambda_stability_failures_total{cause="pivot",method="optq"})",
        R"(certiq_lambda_stability_failures_total{cause="non_finite",method="optq"})",
        R"(certiq_lambda_stability_failures_total{cause="condition",method="qronos"})",
        R"(certiq_lambda_fallbacks_total{method="optq"})",
        "certiq_lambda_ratio_count",
        R"(certiq_relative_error_count{bits="4",method="optq"})",
        R"(certiq_bound_tightness_count{bits="4",method="optq"})",
        "certiq_clipped_weights_total",
        "certiq_dead_features_total",
        "certiq_memory_reserved_bytes",
        R"(certiq_rejected_total{reason="queue_full"})",
        R"(certiq_rejected_total{reason="quota"})",
        R"(certiq_rejected_total{reason="over_budget"})"}) {
    EXPECT_EQ(server.Metric(series), 0) << series;
  }
  for (const char* code : {"OK", "Canceled", "InvalidArgument", "ResourceExhausted", "Unavailable",
                           "DeadlineExceeded", "Unauthenticated"}) {
    EXPECT_EQ(server.Metric(Handled(code)), 0) << code;
  }
  EXPECT_EQ(server.Metric("certiq_workers"), 3);
  EXPECT_EQ(server.Metric("certiq_queue_limit"), 5);
  EXPECT_EQ(server.Metric("certiq_memory_budget_bytes"), 1000);
  EXPECT_EQ(server.Metric(R"(certiq_build_info{isa="test",version="test"})"), 1);
}

TEST(MetricsTest, CountsALayer) {
  TestServer server;
  const Layer layer = MakeRandomLayer(24, 48, 200);
  const Outcome outcome = Quantize(server, QuantizeRequestsFor(layer, 50));
  ASSERT_TRUE(outcome.status.ok());
  ASSERT_TRUE(server.Idle());
  ASSERT_TRUE(TestServer::Eventually([&] { return server.finished().size() == 1; }));
  const v1::Certificate& certificate = outcome.certificate;
  EXPECT_EQ(server.Metric(R"(certiq_jobs_total{method="optq",outcome="succeeded"})"), 1);
  EXPECT_EQ(server.Metric(R"(certiq_jobs{state="running"})"), 0);
  EXPECT_EQ(server.Metric(R"(certiq_jobs{state="succeeded"})"), 0);
  for (const char* phase : {"queue", "factor", "round", "certify", "reference", "pack"}) {
    EXPECT_EQ(server.Metric("certiq_job_seconds_count{method=\"optq\",phase=\"" +
                            std::string(phase) + "\"}"),
              1);
  }
  EXPECT_EQ(
      server.Metric(R"(certiq_job_duration_seconds_count{method="optq",outcome="succeeded"})"), 1);
  EXPECT_EQ(server.Metric(R"(certiq_weights_quantized_total{bits="4",method="optq"})"), 24 * 48);
  EXPECT_EQ(server.Metric("certiq_activation_rows_total"), 200);
  EXPECT_EQ(server.Metric("certiq_activation_bytes_total"), 200 * 48 * 4);
  EXPECT_EQ(server.Metric(R"(certiq_flops_total{phase="statistics"})"), 200.0 * 48 * 48);
  EXPECT_EQ(server.Metric(R"(certiq_flops_total{phase="round"})"), 24.0 * 48 * 48);
  EXPECT_NEAR(server.Metric(R"(certiq_flops_total{phase="factor"})"), 48.0 * 48 * 48 / 3, 1);
  EXPECT_EQ(server.Metric("certiq_lambda_ratio_sum"), 1);
  EXPECT_NEAR(server.Metric(R"(certiq_relative_error_sum{bits="4",method="optq"})"),
              certificate.relative_error(), 1e-6);
  EXPECT_EQ(server.Metric("certiq_clipped_weights_total"),
            static_cast<double>(certificate.clipped_weights()));
  EXPECT_EQ(server.Metric(Handled("OK")), 1);
  EXPECT_EQ(server.Metric("grpc_server_started_total{" + kCall + "}"), 1);
  EXPECT_EQ(server.Metric("grpc_server_msg_received_total{" + kCall + "}"), 1 + 1 + 4);
  EXPECT_GE(server.Metric("grpc_server_msg_sent_total{" + kCall + "}"), 4);
  EXPECT_EQ(server.Metric("grpc_server_handling_seconds_count{" + kCall + "}"), 1);
  // No series carries a name that a client chose.
  EXPECT_EQ(server.Http("/metrics").find("model.layers"), std::string::npos);

  const server::CallSummary summary = server.finished().at(0);
  EXPECT_EQ(summary.request_id, "test-request");
  EXPECT_EQ(summary.layer_name, "model.layers.0.test");
  EXPECT_EQ(summary.rows, 24);
  EXPECT_GT(summary.received_bytes, (24 + 200) * 48 * 4);
  EXPECT_GT(summary.sent_bytes, 24 * 48 * 4);
}

TEST(MetricsTest, CountsRefusals) {
  TestServer server;
  v1::QuantizeRequest header = HeaderFor(MakeRandomLayer(8, 16, 32));
  header.mutable_header()->mutable_spec()->set_bits(9);
  Quantize(server, {header});
  header.mutable_header()->mutable_spec()->set_bits(4);
  header.mutable_header()->mutable_spec()->set_polish(-1);
  Quantize(server, {header});
  ASSERT_TRUE(TestServer::Eventually([&] { return server.finished().size() == 2; }));
  EXPECT_EQ(server.Metric(R"(certiq_rejected_total{reason="invalid"})"), 2);
  // The server offers everything in the contract.
  EXPECT_EQ(server.Metric(R"(certiq_rejected_total{reason="not_offered"})"), 0);
  EXPECT_EQ(server.Metric(Handled("InvalidArgument")), 2);
}

TEST(MetricsTest, CertificateOfAFallback) {
  server::Metrics counters({.version = "v", .isa = "i", .drain_limit = 30});
  engine::LayerCertificate certificate;
  certificate.outcome = engine::Outcome::kFellBackToNearest;
  certificate.spec.bits = 3;
  certificate.rows = 2;
  certificate.features = 5;
  certificate.lambda_requested = 2;
  certificate.lambda_used = 200;
  certificate.damped_squared_error = 9;
  certificate.l2_bound = 6;
  counters.JobFinished(engine::Method::kOptq, v1::JOB_STATE_SUCCEEDED, 0.75, &certificate);
  counters.StabilityFailed(engine::Method::kOptq, engine::StabilityCause::kCondition);
  counters.StabilityFailed(engine::Method::kOptq, engine::StabilityCause::kPivot);
  counters.DrainStarted(1.5e9);
  const std::string text = counters.Text();
  EXPECT_CONTAINS(text,
                  "certiq_job_duration_seconds_sum{method=\"optq\",outcome=\"succeeded\"} 0.75\n");
  EXPECT_CONTAINS(text, "certiq_drain_start_time_seconds 1500000000\n");
  EXPECT_CONTAINS(text, "certiq_drain_limit_seconds 30\n");
  EXPECT_CONTAINS(text, "certiq_lambda_fallbacks_total{method=\"optq\"} 1\n");
  // No layer was quantized with that lambda.
  EXPECT_CONTAINS(text, "certiq_lambda_ratio_count 0\n");
  EXPECT_CONTAINS(text, "certiq_bound_tightness_sum{bits=\"3\",method=\"optq\"} 0.5\n");
  EXPECT_CONTAINS(
      text, "certiq_lambda_stability_failures_total{cause=\"condition\",method=\"optq\"} 1\n");
  EXPECT_CONTAINS(text,
                  "certiq_lambda_stability_failures_total{cause=\"pivot\",method=\"optq\"} 1\n");
}

TEST(HttpServerTest, ServesTwoPages) {
  const TestServer server;
  EXPECT_CONTAINS(server.Http("/metrics"), "200 OK");
  EXPECT_CONTAINS(server.Http("/metrics"), "text/plain; version=0.0.4");
  EXPECT_CONTAINS(server.Http("/metrics?name=x"), "200 OK");
  EXPECT_CONTAINS(server.Http("/healthz"), "ok\n");
  for (const char* path : {"/", "/metrics/", "/metricsx", "/healthz/x", "/../etc/passwd", "/x"}) {
    EXPECT_CONTAINS(server.Http(path), "404");
  }
}

TEST(HttpServerTest, RefusesBadAddressesAndPortsInUse) {
  const auto start = [](const std::string& listen) {
    return server::HttpServer::Start({.listen = listen,
                                      .metrics_text = [] { return ""; },
                                      .health = [] { return absl::OkStatus(); }});
  };
  for (const char* bad : {"", "x", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:80s", "1,2"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(start(bad).status())) << bad;
  }
  const auto first = start("localhost:0");
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_TRUE(absl::IsUnavailable(start("127.0.0.1:" + std::to_string((*first)->port())).status()));
}

TEST(HttpServerTest, EndsQuickly) {
  auto server = server::HttpServer::Start({.listen = "127.0.0.1:0",
                                           .metrics_text = [] { return ""; },
                                           .health = [] { return absl::OkStatus(); }});
  ASSERT_TRUE(server.ok());
  const auto begin = std::chrono::steady_clock::now();
  server->reset();
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(1));
}

}  // namespace
}  // namespace certiq::testing
