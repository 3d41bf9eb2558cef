package main

import (
	"fmt"
	"runtime/debug"
	"sync"
)

// version is set by the linker for releases: -ldflags "-X main.version=v1.2.3".
var version string

// buildVersion is what this program was built from.
type buildVersion struct {
	version, revision, goVersion string
}

// readBuildVersion prefers the linker's value, then what the go command left. It
// reads once.
var readBuildVersion = sync.OnceValue(func() buildVersion {
	v := buildVersion{version: version, revision: "unknown"}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	v.goVersion = info.GoVersion
	if v.version == "" {
		v.version = info.Main.Version
	}
	if v.version == "" {
		v.version = "(devel)"
	}
	dirty := ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision":
			v.revision = s.Value
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "+dirty"
		}
	}
	v.revision += dirty
	return v
})

func (v buildVersion) String() string {
	return fmt.Sprintf("pyrycode-relay %s, revision %s, %s", v.version, v.revision, v.goVersion)
}
