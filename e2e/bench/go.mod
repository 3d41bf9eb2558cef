module pyrycode-relay/e2e/bench

go 1.26

require github.com/gorilla/websocket v1.5.3 // what the usual relay is written with
