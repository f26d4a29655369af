#include "observability/log.h"

#include <spdlog/logger.h>
#include <spdlog/sinks/stdout_sinks.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"

namespace certiq::server {
namespace {

using Json = nlohmann::ordered_json;

std::string Dump(const Json& json) {
  // Names that clients send are UTF-8 by contract; `replace` does not throw if one is not. Output
  // in ASCII keeps control sequences from a terminal.
  return json.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
}

// A text as a line has it: whole, or its start and how much it was.
std::string Cut(const std::string& text) {
  if (text.size() <= kMaxLogText) return text;
  return absl::StrCat(text.substr(0, kMaxLogText), "... (", text.size(), " bytes)");
}

Json ToJson(const LogValue& value) {
  if (const auto* const text = std::get_if<std::string>(&value); text != nullptr) return Cut(*text);
  return std::visit([](const auto& v) { return Json(v); }, value);
}

bool IsPlain(std::string_view text) {
  constexpr std::string_view kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/[]+%@,";
  return !text.empty() && text.find_first_not_of(kPlain) == std::string_view::npos;
}

}  // namespace

std::string FormatText(std::string_view event, const LogFields& fields) {
  std::string line(event);
  for (const auto& [name, value] : fields) {
    line.append(" ").append(name).append("=");
    const auto* const text = std::get_if<std::string>(&value);
    line.append(text != nullptr && text->size() <= kMaxLogText && IsPlain(*text)
                    ? *text
                    : Dump(ToJson(value)));
  }
  return line;
}

std::string FormatJson(std::string_view level, std::string_view event, const LogFields& fields) {
  Json json;
  json["level"] = level;
  json["event"] = event;
  for (const auto& [name, value] : fields) json[std::string(name)] = ToJson(value);
  const std::string object = Dump(json);
  return object.substr(1, object.size() - 2);
}

Log::Log(LogFormat format)
    : format_(format),
      logger_(std::make_unique<spdlog::logger>("certiq",
                                               std::make_shared<spdlog::sinks::stderr_sink_mt>())) {
  logger_->set_pattern(format == LogFormat::kJson ? R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z",%v})"
                                                  : "%Y-%m-%dT%H:%M:%S.%e%z %l %v");
}

Log::~Log() = default;

std::string Log::Line(std::string_view level, std::string_view event,
                      const LogFields& fields) const {
  return format_ == LogFormat::kJson ? FormatJson(level, event, fields) : FormatText(event, fields);
}

// The line is an argument, never the format: braces in it are text.
void Log::Info(std::string_view event, const LogFields& fields) const {
  logger_->info("{}", Line("info", event, fields));
}
void Log::Warning(std::string_view event, const LogFields& fields) const {
  logger_->warn("{}", Line("warning", event, fields));
}
void Log::Error(std::string_view event, const LogFields& fields) const {
  logger_->error("{}", Line("error", event, fields));
}

}  // namespace certiq::server
