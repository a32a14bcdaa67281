# Third-party libraries as imported targets. Distribution packages come first; LibTorch and MuJoCo come from the folder
# that tools/setup.sh fills.
if(DEFINED ENV{ORRERY_CACHE})
  set(default_cache $ENV{ORRERY_CACHE})
elseif(DEFINED ENV{XDG_CACHE_HOME})
  set(default_cache $ENV{XDG_CACHE_HOME}/orrery)
else()
  set(default_cache $ENV{HOME}/.cache/orrery)
endif()
set(ORRERY_CACHE ${default_cache} CACHE PATH "Folder that tools/setup.sh filled")
set(default_libtorch $ENV{ORRERY_LIBTORCH})
if(NOT default_libtorch)
  set(default_libtorch ${ORRERY_CACHE}/torch-2.11.0/torch)
endif()
set(ORRERY_LIBTORCH ${default_libtorch} CACHE PATH "LibTorch: a folder with lib/ and include/")

find_package(absl REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC CONFIG REQUIRED)
find_package(spdlog REQUIRED)
find_package(prometheus-cpp CONFIG REQUIRED)
find_package(nlohmann_json REQUIRED)
find_package(CLI11 REQUIRED)
find_package(GTest REQUIRED)
find_package(benchmark REQUIRED)
find_package(PkgConfig REQUIRED)
find_package(ZLIB REQUIRED)
find_package(Boost REQUIRED)
pkg_check_modules(hiredis REQUIRED IMPORTED_TARGET hiredis)
pkg_check_modules(zstd REQUIRED IMPORTED_TARGET libzstd)
pkg_check_modules(webp REQUIRED IMPORTED_TARGET libwebp libwebpmux libwebpdemux)
pkg_check_modules(jemalloc REQUIRED IMPORTED_TARGET jemalloc)
pkg_check_modules(osmesa REQUIRED IMPORTED_TARGET osmesa)

# LibTorch. Its own find_package wants a CUDA toolkit; the libraries below are all that the build needs.
if(NOT EXISTS ${ORRERY_LIBTORCH}/lib/libtorch_cpu.so)
  message(FATAL_ERROR "LibTorch not found: ${ORRERY_LIBTORCH}/lib/libtorch_cpu.so does not exist. "
    "Run tools/setup.sh, or give -DORRERY_LIBTORCH=<folder with lib/ and include/>.")
endif()
add_library(orrery_torch INTERFACE)
add_library(torch::torch ALIAS orrery_torch)
# Last in the search order: the wheel carries the headers of an old protobuf. -pthread, because a precompiled header fits only
# what is compiled with the same flags, and some dependencies bring that one along.
target_compile_options(orrery_torch INTERFACE -pthread
  "SHELL:-idirafter ${ORRERY_LIBTORCH}/include" "SHELL:-idirafter ${ORRERY_LIBTORCH}/include/torch/csrc/api/include")
target_link_libraries(orrery_torch INTERFACE ${ORRERY_LIBTORCH}/lib/libtorch_cpu.so ${ORRERY_LIBTORCH}/lib/libc10.so)
file(GLOB cuda_runtime_folders ${ORRERY_CACHE}/cudart-*/nvidia/cu13/lib ${ORRERY_CACHE}/cupti-*/nvidia/cu13/lib)
if(ORRERY_CUDA)
  target_link_libraries(orrery_torch INTERFACE -Wl,--no-as-needed ${ORRERY_LIBTORCH}/lib/libtorch_cuda.so
    ${ORRERY_LIBTORCH}/lib/libc10_cuda.so -Wl,--as-needed)
  # cuBLAS, cuDNN and the rest are found where the program runs, not here.
  target_link_options(orrery_torch INTERFACE -Wl,--unresolved-symbols=ignore-in-shared-libs)
  # Headers of the CUDA runtime; no toolkit is needed.
  file(GLOB default_cuda_include ${ORRERY_CACHE}/cuda-headers-*/nvidia/cu13/include
    ${ORRERY_CACHE}/cuda-crt-*/nvidia/cu13/include)
  set(ORRERY_CUDA_INCLUDE "${default_cuda_include}" CACHE STRING "Folders with cuda_runtime_api.h and crt/host_defines.h")
  find_file(cuda_header cuda_runtime_api.h PATHS ${ORRERY_CUDA_INCLUDE} NO_DEFAULT_PATH NO_CACHE)
  find_file(cuda_crt_header crt/host_defines.h PATHS ${ORRERY_CUDA_INCLUDE} NO_DEFAULT_PATH NO_CACHE)
  if(NOT cuda_header OR NOT cuda_crt_header)
    message(FATAL_ERROR "CUDA's headers not found: cuda_runtime_api.h or crt/host_defines.h is not in "
      "\"${ORRERY_CUDA_INCLUDE}\". Run tools/setup.sh, or give -DORRERY_CUDA_INCLUDE=<folder>.")
  endif()
endif()
# libtorch_cpu.so of the CUDA wheel loads libcudart and libcupti, which lie in folders of their own.
set(torch_rpath ${ORRERY_LIBTORCH}/lib ${cuda_runtime_folders})
list(APPEND CMAKE_BUILD_RPATH ${torch_rpath})
foreach(folder ${torch_rpath})
  target_link_options(orrery_torch INTERFACE -Wl,-rpath-link,${folder})
endforeach()
target_link_options(orrery_torch INTERFACE -Wl,--disable-new-dtags)

# MuJoCo and the Control Suite's task descriptions.
set(ORRERY_MUJOCO ${ORRERY_CACHE}/mujoco-3.17.0/mujoco CACHE PATH "MuJoCo: a folder with libmujoco.so.3.17.0 and include/")
set(ORRERY_SUITE ${ORRERY_CACHE}/dm_control-1.0.50/dm_control/suite CACHE PATH "dm_control's suite folder (cartpole.xml, …)")
if(NOT EXISTS ${ORRERY_MUJOCO}/libmujoco.so.3.17.0)
  message(FATAL_ERROR "MuJoCo not found: ${ORRERY_MUJOCO}/libmujoco.so.3.17.0 does not exist. Run tools/setup.sh.")
endif()
add_library(mujoco::mujoco SHARED IMPORTED)
set_target_properties(mujoco::mujoco PROPERTIES
  IMPORTED_LOCATION ${ORRERY_MUJOCO}/libmujoco.so.3.17.0 IMPORTED_SONAME libmujoco.so.3.17.0
  INTERFACE_INCLUDE_DIRECTORIES ${ORRERY_MUJOCO}/include)
list(APPEND CMAKE_BUILD_RPATH ${ORRERY_MUJOCO})
