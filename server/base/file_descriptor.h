// Owner of a file descriptor.

#ifndef CERTIQ_BASE_FILE_DESCRIPTOR_H_
#define CERTIQ_BASE_FILE_DESCRIPTOR_H_

#include <unistd.h>

#include <utility>

namespace certiq::base {

// Closes it on destruction. Movable; -1 stands for none.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.Release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept {
    if (this != &other) {
      Close();
      fd_ = other.Release();
    }
    return *this;
  }
  ~FileDescriptor() { Close(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  // Gives it away.
  int Release() { return std::exchange(fd_, -1); }
  void Close() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

 private:
  int fd_ = -1;
};

}  // namespace certiq::base

#endif  // CERTIQ_BASE_FILE_DESCRIPTOR_H_
