# Installs the programs (component "programs") and what environments and clients of other people are built against (component
# "development"): headers, static libraries, protos and orreryConfig.cmake. Nothing of the latter needs LibTorch.
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)

# Every library that orrery::actor_main or orrery::planner_client needs; install(EXPORT) refuses a list with gaps.
set(installed_libraries base config telemetry envs replay client planner_client actor actor_main
  common_proto config_proto replay_proto planner_proto)
set(header_folders libs/base libs/config libs/telemetry libs/envs libs/replay libs/client services/actor)
set(programs orrery orrery-actor orrery-learner orrery-planner orrery-replay)
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/orrery)
set(include_folder ${CMAKE_INSTALL_INCLUDEDIR}/orrery)

foreach(library ${installed_libraries})
  set_target_properties(orrery_${library} PROPERTIES EXPORT_NAME ${library})
  target_include_directories(orrery_${library} INTERFACE $<INSTALL_INTERFACE:${include_folder}>)
  target_compile_features(orrery_${library} INTERFACE $<INSTALL_INTERFACE:cxx_std_20>)
  install(TARGETS orrery_${library} EXPORT orrery ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development)
endforeach()
foreach(folder ${header_folders})
  install(DIRECTORY ${folder}/ DESTINATION ${include_folder}/${folder} COMPONENT development
    FILES_MATCHING PATTERN "*.h" PATTERN "testing*" EXCLUDE PATTERN naive_index.h EXCLUDE PATTERN store_conformance.h EXCLUDE)
endforeach()
foreach(package common config replay planner)
  install(DIRECTORY ${CMAKE_BINARY_DIR}/proto/orrery/${package} DESTINATION ${include_folder}/orrery COMPONENT development
    FILES_MATCHING PATTERN "*.pb.h")
endforeach()
install(DIRECTORY proto/orrery DESTINATION ${CMAKE_INSTALL_DATADIR}/orrery/proto COMPONENT development
  FILES_MATCHING PATTERN "*.proto")

install(EXPORT orrery NAMESPACE orrery:: DESTINATION ${package_folder} FILE orreryTargets.cmake COMPONENT development)
configure_package_config_file(${CMAKE_SOURCE_DIR}/cmake/orreryConfig.cmake.in ${CMAKE_BINARY_DIR}/orreryConfig.cmake
  INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(${CMAKE_BINARY_DIR}/orreryConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/orreryConfig.cmake ${CMAKE_BINARY_DIR}/orreryConfigVersion.cmake
  DESTINATION ${package_folder} COMPONENT development)

# MuJoCo and LibTorch stay where tools/setup.sh put them.
set_target_properties(${programs} PROPERTIES INSTALL_RPATH "${CMAKE_BUILD_RPATH}")
install(TARGETS ${programs} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT programs)
