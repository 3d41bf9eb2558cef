module pyrycode-relay/e2e

go 1.26

require (
	github.com/coder/websocket v1.8.15 // what the daemon dials with
	github.com/gorilla/websocket v1.5.3 // the most used client in Go; its small buffers fragment large messages
)
