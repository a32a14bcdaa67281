// Which MuJoCo is loaded, for people.
#pragma once

#include <string>

namespace orrery {

// "3.17.0".
std::string MujocoVersion();

}  // namespace orrery
