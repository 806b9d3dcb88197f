// Argument checks of the bindings: each message names the argument, the rule and the value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace mosaic {

template <class Value>
void require(bool holds, const char* function, const char* argument, const char* rule,
             Value value) {
  if (holds) return;
  std::ostringstream message;
  message << function << ": " << argument << " must be " << rule << ", got " << value << ".";
  throw std::invalid_argument(message.str());
}

// Turns an address handed over by Python into a pointer.
template <class T>
T* pointer(std::uintptr_t address, const char* function, const char* argument) {
  require(address != 0, function, argument, "a non-null address", address);
  require(address % alignof(T) == 0, function, argument, "aligned to its element", address);
  return reinterpret_cast<T*>(address);
}

}  // namespace mosaic
