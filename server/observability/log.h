// Structured log on stderr, as text or JSON.

#ifndef CERTIQ_OBSERVABILITY_LOG_H_
#define CERTIQ_OBSERVABILITY_LOG_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace spdlog {
class logger;
}

namespace certiq::server {

enum class LogFormat { kText, kJson };

using LogValue = std::variant<std::string, int64_t, double, bool>;
using LogFields = std::vector<std::pair<std::string_view, LogValue>>;

// A longer text of a field is cut, so that no client can fill a disk by what it is refused for.
inline constexpr size_t kMaxLogText = 1024;

// Writes one line per event: time, level, event name and fields. Control characters are escaped, so
// that no field can begin a line of its own. Thread-safe.
class Log {
 public:
  explicit Log(LogFormat format);
  ~Log();
  Log(const Log&) = delete;
  Log& operator=(const Log&) = delete;

  void Info(std::string_view event, const LogFields& fields) const;
  void Warning(std::string_view event, const LogFields& fields) const;
  void Error(std::string_view event, const LogFields& fields) const;

 private:
  std::string Line(std::string_view level, std::string_view event, const LogFields& fields) const;

  const LogFormat format_;
  std::unique_ptr<spdlog::logger> logger_;
};

// `event` and its fields in one line, without time and level.
std::string FormatText(std::string_view event, const LogFields& fields);
// The members of a JSON object with "level", "event" and the fields.
std::string FormatJson(std::string_view level, std::string_view event, const LogFields& fields);

}  // namespace certiq::server

#endif  // CERTIQ_OBSERVABILITY_LOG_H_
