// Rows of any dtype, read and written by the kernels in the type that they compute in.
#pragma once

#include <algorithm>
#include <vector>

#include "heads_common.h"

namespace grl_ext::cpu {

// Null for dtypes that need no conversion.
inline const ConvertKernels* convert_kernels(at::ScalarType dtype) {
  return dtype == at::kHalf ? &kernels().half : dtype == at::kBFloat16 ? &kernels().bfloat16 : nullptr;
}

// Rows of `tensor` as T: where they are, or a converted copy.
template <class T>
class Rows {
 public:
  Rows(const Tensor& tensor, int64_t width)
      // const_data_ptr also where rows are written, which happens only to tensors that the operator made. For others
      // mutable_data_ptr could copy the tensor (copy-on-write).
      : data_(static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()))),
        row_bytes_(width * tensor.element_size()), width_(width), convert_(convert_kernels(tensor.scalar_type())),
        copy_(convert_ ? kMaxBlockRows * width : 0) {}

  const T* read(int64_t row, int64_t rows) {
    if constexpr (std::is_same_v<T, float>) {
      if (convert_) {
        convert_->widen(copy_.data(), data_ + row * row_bytes_, rows * width_);
        return copy_.data();
      }
    }
    return reinterpret_cast<const T*>(data_ + row * row_bytes_);
  }

  bool converts() const { return convert_ != nullptr; }

  // Where to write rows; written() must follow.
  T* write(int64_t row) { return convert_ ? copy_.data() : reinterpret_cast<T*>(data_ + row * row_bytes_); }

  // Where read(row) will find its rows, for prefetching. A converted copy is always at the same place.
  const T* ahead(int64_t row) const {
    return convert_ ? copy_.data() : reinterpret_cast<const T*>(data_ + row * row_bytes_);
  }

  void written(int64_t row, int64_t rows) {
    if constexpr (std::is_same_v<T, float>) {
      if (convert_) {
        convert_->narrow(data_ + row * row_bytes_, copy_.data(), rows * width_);
      }
    }
  }

 private:
  char* data_;
  const int64_t row_bytes_, width_;
  const ConvertKernels* convert_;
  std::vector<T> copy_;
};

// copy(r, c) for all elements of a matrix, so many columns at a time that what is read and written stays in the L1
// cache until its lines have been used up. (16 would be as good for wide heads, and worse for 100 columns.)
template <class F>
void for_each_element(int64_t height, int64_t width, const F& copy) {
  constexpr int64_t kColumnsTogether = 64;
  for (int64_t c = 0; c < width; c += kColumnsTogether) {
    const int64_t end = std::min(width, c + kColumnsTogether);
    for (int64_t r = 0; r < height; ++r) {
      for (int64_t i = c; i < end; ++i) {
        copy(r, i);
      }
    }
  }
}

// From a row-major matrix to the kernels' columns, which are kMaxBlockRows apart, and back.
template <class T>
void to_columns(T* columns, const T* rows, int64_t height, int64_t width) {
  for_each_element(height, width, [&](int64_t r, int64_t c) { columns[c * kMaxBlockRows + r] = rows[r * width + c]; });
}

template <class T>
void to_rows(T* rows, const T* columns, int64_t height, int64_t width) {
  for_each_element(height, width, [&](int64_t r, int64_t c) { rows[r * width + c] = columns[c * kMaxBlockRows + r]; });
}

// The heads' (N, size) matrices, such as their logits, or none; and a block of their rows as the kernels' columns.
template <class T>
class HeadRows {
 public:
  HeadRows(const HeadColumns& columns, at::TensorList matrices) : columns_(columns) {
    rows_.reserve(columns.count());
    for (int64_t i = 0; i < columns.count() && !matrices.empty(); ++i) {
      rows_.emplace_back(matrices[columns.head(i)], columns.size(i));
    }
  }

  void read(T* block, int64_t row, int64_t rows) {
    for (size_t i = 0; i < rows_.size(); ++i) {
      to_columns(block + columns_.begin(i) * kMaxBlockRows, rows_[i].read(row, rows), rows, columns_.size(i));
    }
  }

  void write(const T* block, int64_t row, int64_t rows) {
    for (size_t i = 0; i < rows_.size(); ++i) {
      to_rows(rows_[i].write(row), block + columns_.begin(i) * kMaxBlockRows, rows, columns_.size(i));
      rows_[i].written(row, rows);
    }
  }

 private:
  const HeadColumns& columns_;
  std::vector<Rows<T>> rows_;
};

}  // namespace grl_ext::cpu
