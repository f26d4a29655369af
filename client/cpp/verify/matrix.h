// Matrix and vector types of the verifier, in float64.
#ifndef CERTIQ_CLIENT_CPP_VERIFY_MATRIX_H_
#define CERTIQ_CLIENT_CPP_VERIFY_MATRIX_H_

#include <Eigen/Core>

namespace certiq::verify {

using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Vector = Eigen::VectorXd;

}  // namespace certiq::verify

#endif  // CERTIQ_CLIENT_CPP_VERIFY_MATRIX_H_
