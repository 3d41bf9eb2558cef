package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

const day = 24 * time.Hour

// authority signs the certificates of the tests' proxies.
type authority struct {
	cert              *x509.Certificate
	key               *ecdsa.PrivateKey
	certFile, keyFile string
}

// trusted is the authority that this process and its children trust.
var trusted authority

// newAuthority leaves its certificate and its key in a directory.
func newAuthority(dir string) (a authority, err error) {
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "e2e authority"},
		NotBefore: time.Now().Add(-400 * day), NotAfter: time.Now().Add(400 * day),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	a.key, a.certFile, a.keyFile, err = writeCertificate(dir, "ca", a.cert, nil, nil)
	return a, err
}

// issue makes a certificate for an address, good for so long.
func (a authority) issue(t testing.TB, ip net.IP, good time.Duration) (certFile, keyFile string) {
	t.Helper()
	until := time.Now().Add(good)
	_, certFile, keyFile, err := writeCertificate(t.TempDir(), "leaf", &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "e2e"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{ip},
		NotBefore: until.Add(-100 * day), NotAfter: until, KeyUsage: x509.KeyUsageDigitalSignature,
	}, a.cert, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return certFile, keyFile
}

// writeCertificate makes a key and a certificate for it, which signs itself
// without a parent.
func writeCertificate(dir, name string, c, parent *x509.Certificate, parentKey *ecdsa.PrivateKey) (
	key *ecdsa.PrivateKey, certFile, keyFile string, err error) {
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, "", "", err
	}
	if parent == nil {
		parent, parentKey = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, parentKey)
	if err != nil {
		return nil, "", "", err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, "", "", err
	}
	certFile, keyFile = filepath.Join(dir, name+".pem"), filepath.Join(dir, name+".key")
	if err := os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		return nil, "", "", err
	}
	return key, certFile, keyFile, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600)
}
