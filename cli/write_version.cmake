# Run at every build: writes ra_version.h when the version, the commit or the build type changed.
#   cmake -DOUT=... -DVERSION=... -DBUILD=... -DSOURCE=... -P write_version.cmake
set(commit "unknown")
find_program(GIT git)
if(GIT AND EXISTS ${SOURCE}/.git)
  execute_process(COMMAND ${GIT} -C ${SOURCE} describe --always --dirty --match=no-such-tag
    OUTPUT_VARIABLE described OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(failed EQUAL 0)
    set(commit "${described}")
  endif()
endif()
set(text "#define RA_VERSION \"${VERSION}\"\n#define RA_VERSION_COMMIT \"${commit}\"\n#define RA_VERSION_BUILD \"${BUILD}\"\n")
if(EXISTS ${OUT})
  file(READ ${OUT} old)
endif()
if(NOT "${old}" STREQUAL "${text}")
  file(WRITE ${OUT} "${text}")
endif()
