module pyrycode-relay/e2e

go 1.26

require (
	github.com/coder/websocket v1.8.15 // what the daemon dials with
	github.com/gorilla/websocket v1.5.3 // the most used client in Go; its small buffers fragment large messages
)

require (
	github.com/chromedp/cdproto v0.159.0
	github.com/chromedp/chromedp v0.23.0 // the browser that opens the status page
)

require github.com/go-json-experiment/json v0.0.0-20260213210345-44df1a37e875 // indirect
